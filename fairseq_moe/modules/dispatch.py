"""Carrying rows to the experts that were chosen for them, and their results back.

``dispatch`` and ``combine`` are a pair; the record that the first returns is what the second needs. Only
rows that survived capacity travel, and only to the rank that owns their expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.exchange import Exchange, ExchangeTimes, LocalExchange
from fairseq_moe.modules.permute import RowPlan, combine_rows, count_rows, plan_rows, take_rows
from fairseq_moe.modules.routing import RoutingDecision

__all__ = ["DispatchRecord", "Dispatcher"]


@dataclass(frozen=True, kw_only=True)
class DispatchRecord:
    """What ``combine`` needs to undo ``dispatch``.

    Args:
        plan: this rank's rows.
        send_splits: rows sent to each of the G ranks.
        recv_splits: rows received from each.
        local_counts_L: rows of each local expert, from all ranks.
        rows_per_expert: every count, where the shape of the batch fixes it; None: routing decides.
        expert_major_R: int64 order that sorts the received rows by local expert; None: they already are.
    """

    plan: RowPlan
    send_splits: list[int]
    recv_splits: list[int]
    local_counts_L: list[int]
    expert_major_R: Tensor | None
    rows_per_expert: int | None = None


class Dispatcher:
    """Moves rows through an exchange; holds no parameters.

    Args:
        exchange: the ranks around this one.
        num_experts: E.
        skip_exchange: measure the cost of everything but the exchange: remote rows are given to this rank's
            own experts, so results are wrong on purpose (the branch's ``--dummy-a2a``).
    """

    def __init__(self, exchange: Exchange, *, num_experts: int, skip_exchange: bool = False) -> None:
        self.exchange = exchange
        self.num_experts = num_experts
        self.skip_exchange = skip_exchange

    def dispatch(
        self,
        x_TD: Tensor,
        decision: RoutingDecision,
        times: ExchangeTimes,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[Tensor, DispatchRecord]:
        """Bring together the rows of this rank's experts, sorted by expert.

        Args:
            x_TD: float tokens.
            decision: their routing.
            times: where the time of the exchange is added.
            meanwhile: called once, while the rows are under way: work that needs none of them.

        Returns:
            (R', D) rows for the local experts, and the record for ``combine``.
        """
        send_GL = count_rows(decision, num_experts=self.num_experts).view(self.exchange.size, -1)
        recv_GL = send_GL if self.skip_exchange else self.exchange.counts(send_GL)
        # The one host synchronisation: split sizes are Python integers.
        send, recv = torch.stack([send_GL, recv_GL]).tolist()
        send_splits = [sum(counts) for counts in send]
        record = DispatchRecord(
            plan=plan_rows(decision, num_experts=self.num_experts, num_rows=sum(send_splits)),
            send_splits=send_splits,
            recv_splits=[sum(counts) for counts in recv],
            local_counts_L=[sum(counts) for counts in zip(*recv, strict=True)],
            expert_major_R=_expert_major_order(recv_GL),
        )
        rows = take_rows(x_TD, record.plan)
        exchange = LocalExchange() if self.skip_exchange else self.exchange
        rows = times.measure(exchange.rows, rows, record.send_splits, record.recv_splits, meanwhile=meanwhile)
        if record.expert_major_R is not None:
            rows = rows.index_select(0, record.expert_major_R)
        return rows, record

    def combine(
        self, y_RD: Tensor, weights_TK: Tensor, record: DispatchRecord, times: ExchangeTimes
    ) -> Tensor:
        """Return each expert output to its token and add them up by weight: (R', D) -> (T, D)."""
        if record.expert_major_R is not None:
            y_RD = y_RD.index_select(0, _inverse(record.expert_major_R))
        if not self.skip_exchange:
            y_RD = times.measure(self.exchange.rows, y_RD, record.recv_splits, record.send_splits)
        return combine_rows(y_RD, weights_TK, record.plan)


def _expert_major_order(recv_GL: Tensor) -> Tensor | None:
    """Order that turns rows sorted by (source rank, expert) into rows sorted by (expert, source rank)."""
    num_ranks, num_local = recv_GL.shape
    if num_ranks == 1 or num_local == 1:
        return None
    expert_of_chunk = torch.arange(num_local, device=recv_GL.device).repeat(num_ranks)
    expert_of_row = torch.repeat_interleave(expert_of_chunk, recv_GL.reshape(-1))
    return torch.argsort(expert_of_row, stable=True)


def _inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes ``order_R``."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
