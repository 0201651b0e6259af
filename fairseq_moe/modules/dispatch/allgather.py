"""Dispatch by gathering: every rank sees all tokens of its group and keeps those of its own experts.

It moves every token to every rank, so it costs more than all-to-all unless most tokens go to most ranks (large
K, few ranks). Results are the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.dispatch.dispatcher import Dispatched
from fairseq_moe.modules.dispatch.exchange import Exchange, Transfer
from fairseq_moe.modules.dispatch.rows import ExpertWork, plan_rows, take_weights
from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = ["AllGatherDispatcher"]


class AllGatherDispatcher:
    """Bring all tokens of the group to every rank.

    Args:
        exchange: the ranks around this one.
        first_expert_id: global id of the first local expert.
    """

    def __init__(self, exchange: Exchange, *, first_expert_id: int) -> None:
        self.exchange = exchange
        self.first_expert_id = first_expert_id

    def send(self, x_TD: Tensor, decision: RoutingDecision, weights_TK: Tensor) -> Dispatched:
        """Send the tokens to every rank; ids and weights follow when these arrive."""
        num_ranks, num_tokens = self.exchange.size, len(x_TD)
        here = torch.full((num_ranks, 1), num_tokens, dtype=torch.int64, device=x_TD.device)
        sizes = self.exchange.counts(here).view(-1).tolist()
        return _Gathering(
            dispatcher=self,
            decision=decision,
            weights_TK=weights_TK,
            sizes=sizes,
            transfer=self.gather(x_TD, sizes),
        )

    def gather(self, values: Tensor, sizes: list[int]) -> Transfer:
        """Bring the values of all ranks' tokens, in rank order; gradients add up over the ranks that saw a token."""
        num_ranks = self.exchange.size
        repeated = values if num_ranks == 1 else values.repeat(num_ranks, 1)
        return self.exchange.send(repeated, [len(values)] * num_ranks, sizes)


@dataclass(frozen=True, kw_only=True)
class _Gathering:
    """Tokens on their way to every rank.

    Args:
        dispatcher: brings their experts and weights, too, and takes outputs back.
        decision: this rank's routing.
        weights_TK: float, its weights.
        sizes: tokens of each of the G ranks.
        transfer: the tokens.
    """

    dispatcher: AllGatherDispatcher
    decision: RoutingDecision
    weights_TK: Tensor
    sizes: list[int]
    transfer: Transfer

    def arrive(self) -> tuple[Tensor, ExpertWork]:
        source_SD = self.transfer.arrive()
        gather = self.dispatcher.gather
        num_local = self.decision.num_experts // self.dispatcher.exchange.size
        local_ids = self.decision.expert_ids_TK.masked_fill(~self.decision.kept_TK, -1)
        local_ids = gather(local_ids, self.sizes).arrive() - self.dispatcher.first_expert_id
        is_local = (local_ids >= 0) & (local_ids < num_local)
        mine = RoutingDecision.counted(
            expert_ids_TK=local_ids.masked_fill(~is_local, 0),
            requested_TK=is_local,
            kept_TK=is_local,
            num_experts=num_local,
            capacity=None,
        )
        plan = plan_rows(mine)
        weights_R = take_weights(gather(self.weights_TK, self.sizes).arrive(), plan)
        return source_SD, ExpertWork(counts_L=mine.counts.kept_E, plan=plan, weights_R=weights_R)

    def combine(self, y_SD: Tensor) -> Tensor:
        """Add up what the ranks' experts have made of each token: (tokens of all ranks, D) -> (T, D)."""
        exchange, num_tokens = self.dispatcher.exchange, len(self.weights_TK)
        if exchange.size == 1:
            return y_SD
        parts = exchange.send(y_SD, self.sizes, [num_tokens] * exchange.size).arrive()
        return parts.view(exchange.size, num_tokens, parts.shape[1]).sum(0)
