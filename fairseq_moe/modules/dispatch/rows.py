"""List rows expert by expert, take them from tokens and add up their results: no tensor of tokens x experts x slots.

tokens   t0 t1 t2              t0 -> experts 2, 0;  t1 -> 0, 1;  t2 -> 2, (dropped)
rows     t0 t1 | t1 | t0 t2    expert 0 | expert 1 | expert 2, tokens in order within an expert
token_R   0  1    1    0  2
row_TK   3 0 | 1 2 | 4 -1      the row of each token's choices, -1 for what was dropped

Both directions only read by index and never write to one token from several rows: a token is the sum of the rows that
``row_TK`` names, choices in order, the same every time.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.fused.add_rows import add_rows, spread_rows
from fairseq_moe.fused.launch import runs_triton
from fairseq_moe.fused.sort_rows import sort_assignments
from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = [
    "ExpertWork",
    "RowPlan",
    "add_by_token",
    "combine_rows",
    "plan_order",
    "plan_rows",
    "take_rows",
    "take_weights",
]

_CPU_CHUNK = 512  # rows that a CPU handles at once, so that they stay in its cache


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """List the kept assignments, sorted by (expert, token, choice).

    Args:
        assignment_R: int64, index into the flattened (T, K) assignments.
        token_R: int64, the token of each row.
        row_TK: int64, the row of each choice; -1 where it was dropped.
    """

    assignment_R: Tensor
    token_R: Tensor
    row_TK: Tensor

    def first(self, num_rows: int) -> "RowPlan":
        """Cut off what stands behind the rows that there are."""
        if num_rows == len(self.assignment_R):
            return self
        return replace(self, assignment_R=self.assignment_R[:num_rows], token_R=self.token_R[:num_rows])

    @functools.cached_property
    def bags(self) -> tuple[Tensor, Tensor]:
        """List the rows by (token, choice) without those that were dropped, and where each token's begin; on CPU."""
        kept_TK = self.row_TK >= 0
        if bool(kept_TK.all()):
            starts_T = torch.arange(0, kept_TK.numel(), kept_TK.shape[1], device=kept_TK.device)
            return self.row_TK.reshape(-1), starts_T
        kept_T = kept_TK.sum(1)
        return self.row_TK[kept_TK], kept_T.cumsum(0) - kept_T


@dataclass(frozen=True, kw_only=True)
class ExpertWork:
    """Tell a rank's experts what to do with the rows, or tokens, that they are given.

    Args:
        counts_L: rows of each local expert, zeros included: int64 on the device, or integers that the host knows.
        plan: which row of the input each of their rows is, and where in the output its result is added; beside
            counts on the device there may be more rows than they count. None: the input's rows are sorted by expert,
            and each result stands where its row does.
        weights_R: float, of each result in the output; None: 1. Needs a plan, or ValueError is raised.
        rows_per_expert: every count, where the shape of the batch fixes it; None: routing decides.
        known_L: the counts as integers, where the host knows those on the device, too; then the plan has no more rows.
    """

    counts_L: Tensor | Sequence[int]
    plan: RowPlan | None = None
    weights_R: Tensor | None = None
    rows_per_expert: int | None = None
    known_L: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.weights_R is not None and self.plan is None:
            raise ValueError("rows have weights, but no plan of where their weighted results are added")

    @property
    def is_sized(self) -> bool:
        """Whether the host knows how many rows there are, and the plan has no more."""
        return self.known_L is not None or not isinstance(self.counts_L, Tensor)

    def host_counts(self) -> tuple[int, ...]:
        """Count the rows of each local expert as numbers on the host; waits for the device if they are only there."""
        if self.known_L is not None:
            return tuple(self.known_L)
        return tuple(self.counts_L.tolist() if isinstance(self.counts_L, Tensor) else self.counts_L)

    def on_host(self) -> "ExpertWork":
        """Bring the counts to the host, for kernels that need sizes there, and cut the plan to that many rows."""
        if self.is_sized:
            return self
        known_L = self.host_counts()
        num_rows = sum(known_L)
        plan, weights_R = self.plan, self.weights_R
        if weights_R is not None and len(weights_R) > num_rows:
            weights_R = weights_R[:num_rows]
        return replace(self, known_L=known_L, plan=plan and plan.first(num_rows), weights_R=weights_R)


def plan_rows(decision: RoutingDecision) -> RowPlan:
    """List the kept assignments expert by expert, and behind them those that were dropped.

    So the plan's length is that of all assignments and nothing waits for the device. How many rows there are, its
    counts say; ``RowPlan.first`` cuts off the rest.
    """
    assignment_A, row_TK = sort_assignments(
        decision.expert_ids_TK, decision.kept_TK, num_experts=decision.num_experts
    )
    return RowPlan(assignment_R=assignment_A, token_R=assignment_A // row_TK.shape[1], row_TK=row_TK)


def plan_order(order_R: Tensor) -> RowPlan:
    """Plan rows in another order: row r is row ``order_R[r]`` of the input, and its result goes back there."""
    return RowPlan(assignment_R=order_R, token_R=order_R, row_TK=_inverse(order_R).unsqueeze(1))


def _inverse(order: Tensor) -> Tensor:
    """Invert a permutation: int64 (R,)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def take_rows(x_TD: Tensor, plan: RowPlan) -> Tensor:
    """Copy each row's token: (T, D) -> (R, D)."""
    return _TakeRows.apply(x_TD, plan)


def take_weights(weights_TK: Tensor, plan: RowPlan) -> Tensor:
    """Take each row's weight: (T, K) -> (R,)."""
    return weights_TK.reshape(-1).index_select(0, plan.assignment_R)


def combine_rows(y_RD: Tensor, weights_R: Tensor | None, plan: RowPlan) -> Tensor:
    """Add up each token's rows, times their weights; zero for a token without rows: (R, D) -> (T, D)."""
    if weights_R is None:
        return _AddRows.apply(y_RD, plan)
    return _CombineRows.apply(y_RD, weights_R.to(y_RD.dtype), plan)


def add_by_token(rows_RD: Tensor, plan: RowPlan, weights_R: Tensor | None = None) -> Tensor:
    """Add up each token's rows, times their weights, without a gradient: (R, D) -> (T, D)."""
    if _is_for_kernels(rows_RD):
        return add_rows(rows_RD, plan.row_TK, weights_R=weights_R)
    by_token_R, starts_T = plan.bags
    if weights_R is not None:
        weights_R = weights_R.index_select(0, by_token_R)
    return F.embedding_bag(by_token_R, rows_RD, starts_T, mode="sum", per_sample_weights=weights_R)


def _is_for_kernels(rows_RD: Tensor) -> bool:
    """Tell whether ``fused.add_rows`` adds rows up; on a CPU, bags and chunks are faster than its plain torch."""
    return rows_RD.device.type != "cpu" or runs_triton(rows_RD)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return add_by_token(grads[0].contiguous(), ctx.plan), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return add_by_token(y_RD.contiguous(), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.plan.token_R), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_R: Tensor, plan: RowPlan) -> Tensor:
        ctx.save_for_backward(y_RD, weights_R)
        ctx.plan = plan
        return add_by_token(y_RD.contiguous(), plan, weights_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weights_R = ctx.saved_tensors
        grad_TD, num_rows = grads[0], len(y_RD)
        if _is_for_kernels(y_RD):
            return *spread_rows(grad_TD, ctx.plan.token_R, y_RD, weights_R), None
        grad_y_RD, grad_weights_R = torch.empty_like(y_RD), torch.empty_like(weights_R)
        for start in range(0, num_rows, _CPU_CHUNK):
            rows = slice(start, start + _CPU_CHUNK)
            grad = grad_TD.index_select(0, ctx.plan.token_R[rows])
            torch.mul(grad, weights_R[rows].unsqueeze(1), out=grad_y_RD[rows])
            torch.sum(grad.mul_(y_RD[rows]), dim=1, out=grad_weights_R[rows])
        return grad_y_RD, grad_weights_R, None
