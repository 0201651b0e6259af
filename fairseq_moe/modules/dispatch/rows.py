"""List rows expert by expert, take them from tokens and add up their results: no tensor of tokens x experts x slots.

tokens      t0 t1 t2              t0 -> experts 2, 0;  t1 -> 0, 1;  t2 -> 2, (dropped)
rows        t0 t1 | t1 | t0 t2    expert 0 | expert 1 | expert 2, tokens in order within an expert
token_R      0  1    1    0  2
by_token_R   3  0 |  1  2 |  4    the same rows, token by token, choices in order

Both directions only read by index and never write to one token from several rows: tokens are sums over ``by_token_R``,
which ``embedding_bag`` computes in one pass and in the same order every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = [
    "ExpertWork",
    "RowPlan",
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
        by_token_R: int64, the rows sorted by (token, choice).
        starts_T: int64, where each token's rows start in ``by_token_R``.
    """

    assignment_R: Tensor
    token_R: Tensor
    by_token_R: Tensor
    starts_T: Tensor

    def first(self, num_rows: int) -> "RowPlan":
        """Cut off what stands behind the rows that there are."""
        if num_rows == len(self.assignment_R):
            return self
        return RowPlan(
            assignment_R=self.assignment_R[:num_rows],
            token_R=self.token_R[:num_rows],
            by_token_R=self.by_token_R[:num_rows],
            starts_T=self.starts_T,
        )


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
        num_rows: sum of counts that are on the device, where the host knows it; then the plan has no more rows.
    """

    counts_L: Tensor | Sequence[int]
    plan: RowPlan | None = None
    weights_R: Tensor | None = None
    rows_per_expert: int | None = None
    num_rows: int | None = None

    def __post_init__(self) -> None:
        if self.weights_R is not None and self.plan is None:
            raise ValueError("rows have weights, but no plan of where their weighted results are added")

    def host_counts(self) -> tuple[int, ...]:
        """Count the rows of each local expert as numbers on the host; waits for the device if they are there."""
        return tuple(self.counts_L.tolist() if isinstance(self.counts_L, Tensor) else self.counts_L)

    def sized(self) -> "ExpertWork":
        """Cut the plan to the rows that there are, for kernels that take counts on the device; may wait for it."""
        return self if self.num_rows is not None else self.on_host()

    def on_host(self) -> "ExpertWork":
        """Bring the counts to the host, for kernels that need sizes there, and cut the plan to that many rows."""
        if not isinstance(self.counts_L, Tensor):
            return self
        counts_L = self.host_counts()
        num_rows = sum(counts_L)
        plan, weights_R = self.plan, self.weights_R
        if weights_R is not None and len(weights_R) > num_rows:
            weights_R = weights_R[:num_rows]
        return replace(self, counts_L=counts_L, plan=plan and plan.first(num_rows), weights_R=weights_R)


def plan_rows(decision: RoutingDecision) -> RowPlan:
    """List the kept assignments expert by expert, and behind them those that were dropped.

    So the plan's length is that of all assignments and nothing waits for the device. How many rows there are, its
    counts say; ``RowPlan.first`` cuts off the rest.
    """
    top_k = decision.expert_ids_TK.shape[1]
    kept_A = decision.kept_TK.reshape(-1)
    # An id above all experts sorts dropped assignments to the end; a stable sort keeps an expert's tokens in order.
    ids = decision.expert_ids_TK.masked_fill(~decision.kept_TK, decision.num_experts)
    assignment_A = torch.argsort(ids.reshape(-1), stable=True)
    # ``by_token`` lists the same rows in (token, choice) order, so a kept assignment stands in it behind the kept ones
    # before it, and a dropped one behind all kept ones and the dropped ones before it.
    order_A = torch.arange(len(kept_A), device=kept_A.device)
    kept_so_far_A = kept_A.cumsum(0)
    dropped_place_A = kept_A.sum() + order_A - kept_so_far_A
    place_A = torch.where(kept_A, kept_so_far_A - 1, dropped_place_A).index_select(0, assignment_A)
    return RowPlan(
        assignment_R=assignment_A,
        token_R=assignment_A // top_k,
        by_token_R=torch.empty_like(place_A).scatter_(0, place_A, order_A),
        # Kept assignments up to and with a token's last choice, less its own, are those of the tokens before it.
        starts_T=kept_so_far_A[top_k - 1 :: top_k] - decision.kept_TK.sum(1),
    )


def plan_order(order_R: Tensor) -> RowPlan:
    """Plan rows in another order: row r is row ``order_R[r]`` of the input, and its result goes back there."""
    rows = torch.arange(len(order_R), device=order_R.device)
    return RowPlan(
        assignment_R=order_R,
        token_R=order_R,
        by_token_R=torch.empty_like(order_R).scatter_(0, order_R, rows),
        starts_T=rows,
    )


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


def _add_by_token(rows_RD: Tensor, plan: RowPlan, weights_R: Tensor | None = None) -> Tensor:
    if weights_R is not None:
        weights_R = weights_R.index_select(0, plan.by_token_R)
    return F.embedding_bag(plan.by_token_R, rows_RD, plan.starts_T, mode="sum", per_sample_weights=weights_R)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _add_by_token(grads[0].contiguous(), ctx.plan), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return _add_by_token(y_RD.contiguous(), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.plan.token_R), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_R: Tensor, plan: RowPlan) -> Tensor:
        ctx.save_for_backward(y_RD, weights_R)
        ctx.plan = plan
        return _add_by_token(y_RD.contiguous(), plan, weights_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weights_R = ctx.saved_tensors
        grad_TD, num_rows = grads[0], len(y_RD)
        grad_y_RD, grad_weights_R = torch.empty_like(y_RD), torch.empty_like(weights_R)
        step = _CPU_CHUNK if y_RD.device.type == "cpu" else max(num_rows, 1)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            grad = grad_TD.index_select(0, ctx.plan.token_R[rows])
            torch.mul(grad, weights_R[rows].unsqueeze(1), out=grad_y_RD[rows])
            torch.sum(grad.mul_(y_RD[rows]), dim=1, out=grad_weights_R[rows])
        return grad_y_RD, grad_weights_R, None
