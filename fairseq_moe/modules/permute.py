"""From tokens to rows sorted by expert and back: no tensor of size tokens x experts x capacity.

tokens      t0 t1 t2              t0 -> experts 2, 0;  t1 -> 0, 1;  t2 -> 2, (dropped)
rows        t0 t1 | t1 | t0 t2    expert 0 | expert 1 | expert 2, tokens in order within an expert
token_of_R   0  1    1    0  2
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.routing import RoutingDecision, count_ids

__all__ = ["RowPlan", "combine_rows", "count_rows", "plan_rows", "take_rows"]


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """The kept assignments, sorted by (expert, token, choice).

    Args:
        assignment_R: int64, index into the flattened (T, K) assignments.
        token_R: int64, the token of each row.
    """

    assignment_R: Tensor
    token_R: Tensor


def count_rows(decision: RoutingDecision, *, num_experts: int) -> Tensor:
    """Kept assignments of each expert: int64 (E,)."""
    return count_ids(_kept_ids(decision, dropped_id=num_experts), size=num_experts + 1)[:num_experts]


def plan_rows(decision: RoutingDecision, *, num_experts: int, num_rows: int) -> RowPlan:
    """List the kept assignments expert by expert.

    Args:
        decision: who goes where.
        num_experts: E.
        num_rows: R, the sum of ``count_rows``; the caller has it on the host, where sizes are needed.
    """
    by_expert = torch.argsort(_kept_ids(decision, dropped_id=num_experts), stable=True)
    assignment_R = by_expert[:num_rows]
    return RowPlan(assignment_R=assignment_R, token_R=assignment_R // decision.expert_ids_TK.shape[1])


def _kept_ids(decision: RoutingDecision, *, dropped_id: int) -> Tensor:
    return decision.expert_ids_TK.masked_fill(~decision.kept_TK, dropped_id).reshape(-1)


def take_rows(x_TD: Tensor, plan: RowPlan) -> Tensor:
    """(T, D) -> (R, D): each kept assignment's token."""
    return x_TD.index_select(0, plan.token_R)


def combine_rows(y_RD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Tensor:
    """(R, D) -> (T, D): sum of each token's rows times their weights; zero for a token without rows."""
    weights_R = weights_TK.reshape(-1).index_select(0, plan.assignment_R).to(y_RD.dtype)
    # With at most two rows per token the sum does not depend on the order in which a GPU adds them.
    out_TD = y_RD.new_zeros((weights_TK.shape[0], y_RD.shape[1]))
    return out_TD.index_add(0, plan.token_R, y_RD * weights_R.unsqueeze(-1))
