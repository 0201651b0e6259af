"""From tokens to rows sorted by expert and back: no tensor of size tokens x experts x capacity.

tokens      t0 t1 t2              t0 -> experts 2, 0;  t1 -> 0, 1;  t2 -> 2, (dropped)
rows        t0 t1 | t1 | t0 t2    expert 0 | expert 1 | expert 2, tokens in order within an expert
token_of_R   0  1    1    0  2
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.routing import RoutingDecision

__all__ = ["RowPlan", "combine_rows", "plan_rows", "take_rows"]


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """The kept assignments, sorted by (expert, token, choice).

    Args:
        assignment_R: int64, index into the flattened (T, K) assignments.
        token_R: int64, the token of each row.
        counts_E: int64, rows of each expert.
    """

    assignment_R: Tensor
    token_R: Tensor
    counts_E: Tensor


def plan_rows(decision: RoutingDecision, *, num_experts: int) -> RowPlan:
    """List the kept assignments expert by expert."""
    top_k = decision.expert_ids_TK.shape[1]
    ids = decision.expert_ids_TK.masked_fill(~decision.kept_TK, num_experts).reshape(-1)
    counts = torch.bincount(ids, minlength=num_experts + 1)
    by_expert = torch.argsort(ids, stable=True)
    assignment_R = by_expert[: ids.numel() - int(counts[num_experts])]
    return RowPlan(assignment_R=assignment_R, token_R=assignment_R // top_k, counts_E=counts[:num_experts])


def take_rows(x_TD: Tensor, plan: RowPlan) -> Tensor:
    """(T, D) -> (R, D): each kept assignment's token."""
    return x_TD.index_select(0, plan.token_R)


def combine_rows(y_RD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Tensor:
    """(R, D) -> (T, D): sum of each token's rows times their weights; zero for a token without rows."""
    weights_R = weights_TK.reshape(-1).index_select(0, plan.assignment_R).to(y_RD.dtype)
    out_TD = y_RD.new_zeros((weights_TK.shape[0], y_RD.shape[1]))
    return out_TD.index_add(0, plan.token_R, y_RD * weights_R.unsqueeze(-1))
