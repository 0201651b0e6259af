"""Dispatch by all-to-all: a row travels to the one rank that owns its expert, and its result travels back.

Routing weights do not travel: they are applied to what comes back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.dispatch.dispatcher import Dispatched, Planner, SendPlan, plan_kept
from fairseq_moe.modules.dispatch.exchange import Exchange, Transfer
from fairseq_moe.modules.dispatch.rows import (
    ExpertWork,
    RowPlan,
    combine_rows,
    plan_order,
    take_rows,
    take_weights,
)
from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = ["AllToAllDispatcher"]


class AllToAllDispatcher:
    """Send each row to the rank of its expert.

    Args:
        exchange: the G ranks that share the experts, more than one.
        plan: lists the rows.
    """

    def __init__(self, exchange: Exchange, *, plan: Planner = plan_kept) -> None:
        self.exchange = exchange
        self.plan = plan

    def send(self, x_TD: Tensor, decision: RoutingDecision, weights_TK: Tensor) -> Dispatched:
        """Send rows to the ranks of their experts; waits for the device once, for sizes that routing decides."""
        plan = self.plan(decision)
        send_GL = plan.counts_E.view(self.exchange.size, -1)
        if plan.is_same_everywhere:
            recv_GL = send_GL
            send = recv = [[plan.num_slots or 0] * send_GL.shape[1]] * self.exchange.size
        else:
            recv_GL = self.exchange.counts(send_GL)
            # The one host synchronisation: split sizes are Python integers.
            send, recv = torch.stack([send_GL, recv_GL]).tolist()
        send_splits, recv_splits = [sum(counts) for counts in send], [sum(counts) for counts in recv]
        counts_L = [sum(counts) for counts in zip(*recv, strict=True)]
        rows = plan.rows.first(sum(send_splits))
        weights_R = take_weights(plan.with_filler(weights_TK), rows)
        rows_RD = take_rows(plan.with_filler(x_TD), rows)
        return _OnTheWay(
            plan=plan,
            rows=rows,
            weights_R=weights_R,
            exchange=self.exchange,
            send_splits=send_splits,
            recv_splits=recv_splits,
            transfer=self.exchange.send(rows_RD, send_splits, recv_splits),
            work=ExpertWork(
                counts_L=counts_L,
                plan=_expert_major(recv_GL, sum(counts_L)),
                rows_per_expert=None if plan.num_slots is None else counts_L[0],
            ),
        )


@dataclass(frozen=True, kw_only=True)
class _OnTheWay:
    """Rows of an all-to-all, and what their way back needs.

    Args:
        plan: what was sent.
        rows: its rows, no more than there are.
        weights_R: float, their routing weights.
        exchange: takes them back.
        send_splits: rows sent to each of the G ranks.
        recv_splits: rows received from each.
        transfer: the rows under way.
        work: of this rank's experts.
    """

    plan: SendPlan
    rows: RowPlan
    weights_R: Tensor
    exchange: Exchange
    send_splits: list[int]
    recv_splits: list[int]
    transfer: Transfer
    work: ExpertWork

    def arrive(self) -> tuple[Tensor, ExpertWork]:
        return self.transfer.arrive(), self.work

    def combine(self, y_SD: Tensor) -> Tensor:
        y_RD = self.exchange.send(y_SD, self.recv_splits, self.send_splits).arrive()
        return self.plan.without_filler(combine_rows(y_RD, self.weights_R, self.rows))


def _expert_major(recv_GL: Tensor, num_rows: int) -> RowPlan | None:
    """Take rows that are sorted by (source rank, expert) in the order of (expert, source rank)."""
    num_local = recv_GL.shape[1]
    if num_local == 1:
        return None
    expert_of_chunk = torch.arange(num_local, device=recv_GL.device).repeat(len(recv_GL))
    expert_of_row = torch.repeat_interleave(expert_of_chunk, recv_GL.reshape(-1), output_size=num_rows)
    return plan_order(torch.argsort(expert_of_row, stable=True))
