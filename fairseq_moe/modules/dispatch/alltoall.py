"""Dispatch by all-to-all: a row travels to the one rank that owns its expert, and its result travels back.

Routing weights do not travel: they are applied to what comes back.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.dispatcher import Dispatched, Planner, SendPlan, plan_kept
from fairseq_moe.modules.dispatch.exchange import Exchange, Transfer
from fairseq_moe.modules.dispatch.host_copy import HostCopy
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

    Where each expert is divided into parts, neighbouring ranks hold one each: a row is sent to all of them, and what
    they make of it is added up where it came from.

    Args:
        exchange: the G ranks that share the experts, more than one.
        plan: lists the rows.
        parts: ranks that share an expert.
    """

    def __init__(self, exchange: Exchange, *, plan: Planner = plan_kept, parts: int = 1) -> None:
        self.exchange = exchange
        self.plan = plan
        self.parts = parts

    def send(self, x_TD: Tensor, decision: RoutingDecision, weights_TK: Tensor) -> Dispatched:
        """Send rows to the ranks of their experts; waits for the device once, for sizes that routing decides."""
        plan, size, parts = self.plan(decision), self.exchange.size, self.parts
        send_GL = plan.counts_E.view(size // parts, -1)
        if parts > 1:
            send_GL = send_GL.repeat_interleave(parts, 0)
        x_TD, weights_TK = plan.with_filler(x_TD), plan.with_filler(weights_TK)
        taken_RD = None
        if plan.is_same_everywhere:
            recv_GL = send_GL
            send = recv = [[plan.num_slots or 0] * send_GL.shape[1]] * size
        else:
            recv_GL = self.exchange.counts(send_GL)
            # The one host synchronisation: split sizes are Python integers.
            sizes = HostCopy(torch.cat([send_GL, recv_GL]))
            if sizes.is_on_its_way:  # take what was dropped, too: the device has work while the host waits
                taken_RD = take_rows(x_TD, plan.rows)
            numbers = sizes.wait()
            send, recv = numbers[:size], numbers[size:]
        send_splits, recv_splits = [sum(counts) for counts in send], [sum(counts) for counts in recv]
        counts_L = [sum(counts) for counts in zip(*recv, strict=True)]
        rows = plan.rows.first(sum(send_splits) // parts)
        rows_RD = take_rows(x_TD, rows) if taken_RD is None else taken_RD[: sum(send_splits) // parts]
        if parts > 1:
            chunks = rows_RD.split(send_splits[::parts])
            rows_RD = torch.cat([chunk for chunk in chunks for _ in range(parts)])
        return _OnTheWay(
            plan=plan,
            rows=rows,
            weights_R=take_weights(weights_TK, rows),
            exchange=self.exchange,
            parts=parts,
            send_splits=send_splits,
            recv_splits=recv_splits,
            transfer=self.exchange.send(rows_RD, send_splits, recv_splits),
            work=ExpertWork(
                counts_L=recv_GL.sum(0),
                plan=_expert_major(recv_GL, sum(counts_L)),
                rows_per_expert=None if plan.num_slots is None else counts_L[0],
                known_L=counts_L,
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
        parts: ranks that share an expert.
        send_splits: rows sent to each of the G ranks.
        recv_splits: rows received from each.
        transfer: the rows under way.
        work: of this rank's experts.
    """

    plan: SendPlan
    rows: RowPlan
    weights_R: Tensor
    exchange: Exchange
    parts: int
    send_splits: list[int]
    recv_splits: list[int]
    transfer: Transfer
    work: ExpertWork

    def arrive(self) -> tuple[Tensor, ExpertWork]:
        return self.transfer.arrive(), self.work

    def combine(self, y_SD: Tensor, *, dropout: float = 0.0) -> Tensor:
        y_RD = self.exchange.send(y_SD, self.recv_splits, self.send_splits).arrive()
        if self.parts > 1:
            by_rank = y_RD.split(self.send_splits)
            y_RD = torch.cat([sum(by_rank[i : i + self.parts]) for i in range(0, len(by_rank), self.parts)])
        if dropout:
            y_RD = F.dropout(y_RD, dropout)
        return self.plan.without_filler(combine_rows(y_RD, self.weights_R, self.rows))


def _expert_major(recv_GL: Tensor, num_rows: int) -> RowPlan | None:
    """Take rows that are sorted by (source rank, expert) in the order of (expert, source rank)."""
    num_local = recv_GL.shape[1]
    if num_local == 1:
        return None
    expert_of_chunk = torch.arange(num_local, device=recv_GL.device).repeat(len(recv_GL))
    expert_of_row = torch.repeat_interleave(expert_of_chunk, recv_GL.reshape(-1), output_size=num_rows)
    return plan_order(torch.argsort(expert_of_row, stable=True))
