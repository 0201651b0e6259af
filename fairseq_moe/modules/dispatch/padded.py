"""Plan fixed shapes: every expert gets exactly its capacity in slots from every rank, filled with zeros where empty.

The filler is one more token, of zeros and with weight 0, that touches no result and no gradient. Where the largest
batch is known, every rank sends the slots of that batch, so sizes do not depend on the data, the exchange has even
splits and nothing waits for the device; elsewhere the ranks first tell each other their capacities.
"""

import torch

from fairseq_moe.modules.dispatch.dispatcher import SendPlan, plan_kept
from fairseq_moe.modules.dispatch.rows import RowPlan
from fairseq_moe.modules.routing.contract import RoutingDecision, queue_positions

__all__ = ["plan_padded"]


def plan_padded(decision: RoutingDecision) -> SendPlan:
    """Plan a fixed number of slots for each expert; without a capacity (generation) there is nothing to pad to."""
    if decision.capacity is None:
        return plan_kept(decision)
    num_slots = decision.capacity if decision.num_slots is None else decision.num_slots
    return SendPlan(
        rows=_fill_slots(decision, num_slots=num_slots),
        counts_E=torch.full_like(decision.counts.kept_E, num_slots),
        num_slots=num_slots,
        is_same_everywhere=decision.num_slots is not None,
    )


def _fill_slots(decision: RoutingDecision, *, num_slots: int) -> RowPlan:
    """List the slots of all experts as rows of T + 1 tokens; an expert's kept tokens take its slots in their order."""
    num_tokens, top_k = decision.expert_ids_TK.shape
    ids_A1, kept_A1 = decision.expert_ids_TK.reshape(-1, 1), decision.kept_TK.reshape(-1, 1)
    position_A1 = queue_positions(ids_A1, kept_A1, num_experts=decision.num_experts)
    num_rows = decision.num_experts * num_slots
    # What was dropped goes to one more slot, which is cut off.
    slot_A = torch.where(kept_A1, ids_A1 * num_slots + position_A1, num_rows).view(-1)
    assignments_A = torch.arange(len(slot_A), device=slot_A.device)
    # A slot that nothing is written to keeps the number one past the last assignment: that of token T, the filler.
    assignment_R = slot_A.new_full((num_rows + 1,), len(slot_A)).scatter_(0, slot_A, assignments_A)
    assignment_R = assignment_R[:num_rows]
    # The filler, the last token, needs no sum: its output is cut off. Sums are taken in the order of the experts.
    row_TK = slot_A.masked_fill(slot_A == num_rows, -1).view(num_tokens, top_k).sort(dim=1).values
    return RowPlan(
        assignment_R=assignment_R,
        token_R=assignment_R // top_k,
        row_TK=torch.cat([row_TK, row_TK.new_full((1, top_k), -1)]),
    )
