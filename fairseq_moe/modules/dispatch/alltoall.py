"""Carrying rows to the experts that were chosen for them, and their results back.

``dispatch`` and ``combine`` are a pair; the record that the first returns is what the second needs. Only
rows that survived capacity travel, and only to the rank that owns their expert. Routing weights do not: they are
applied to what comes back, except on one rank, where nothing travels and the experts apply them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.dispatch.exchange import Exchange, ExchangeTimes, LocalExchange
from fairseq_moe.modules.dispatch.rows import (
    ExpertWork,
    RowPlan,
    combine_rows,
    count_rows,
    plan_order,
    plan_rows,
    take_rows,
    take_weights,
)
from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = ["DispatchRecord", "Dispatcher"]


@dataclass(frozen=True, kw_only=True)
class DispatchRecord:
    """What ``combine`` needs to undo ``dispatch``.

    Args:
        plan: this rank's rows.
        weights_R: float, their routing weights.
        send_splits: rows sent to each of the G ranks.
        recv_splits: rows received from each.
    """

    plan: RowPlan
    weights_R: Tensor
    send_splits: list[int]
    recv_splits: list[int]


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
        weights_TK: Tensor,
        times: ExchangeTimes,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[Tensor, ExpertWork, DispatchRecord | None]:
        """Bring together the rows of this rank's experts.

        Args:
            x_TD: float tokens.
            decision: their routing.
            weights_TK: float, of each choice.
            times: where the time of the exchange is added.
            meanwhile: called once, while the rows are under way: work that needs none of them.

        Returns:
            What the experts read, (S, D); what they do with it; and the record for ``combine``.
        """
        send_GL = count_rows(decision, num_experts=self.num_experts).view(self.exchange.size, -1)
        recv_GL = send_GL if self.skip_exchange else self.exchange.counts(send_GL)
        # The one host synchronisation: split sizes are Python integers.
        send, recv = torch.stack([send_GL, recv_GL]).tolist()
        send_splits = [sum(counts) for counts in send]
        local_counts_L = [sum(counts) for counts in zip(*recv, strict=True)]
        plan = plan_rows(decision, num_experts=self.num_experts, num_rows=sum(send_splits))
        weights_R = take_weights(weights_TK, plan)
        if self.exchange.size == 1:  # experts read tokens themselves and add their results to them
            x_TD = self.exchange.rows(x_TD, send_splits, send_splits, meanwhile=meanwhile)
            return x_TD, ExpertWork(counts_L=local_counts_L, plan=plan, weights_R=weights_R), None
        record = DispatchRecord(
            plan=plan,
            weights_R=weights_R,
            send_splits=send_splits,
            recv_splits=[sum(counts) for counts in recv],
        )
        rows = take_rows(x_TD, plan)
        exchange = LocalExchange() if self.skip_exchange else self.exchange
        rows = times.measure(exchange.rows, rows, record.send_splits, record.recv_splits, meanwhile=meanwhile)
        work = ExpertWork(counts_L=local_counts_L, plan=_expert_major(recv_GL, sum(local_counts_L)))
        return rows, work, record

    def combine(self, y_SD: Tensor, record: DispatchRecord | None, times: ExchangeTimes) -> Tensor:
        """Return each expert output to its token and add them up by weight: (S, D) -> (T, D)."""
        if record is None:
            return y_SD
        if not self.skip_exchange:
            y_SD = times.measure(self.exchange.rows, y_SD, record.recv_splits, record.send_splits)
        return combine_rows(y_SD, record.weights_R, record.plan)


def _expert_major(recv_GL: Tensor, num_rows: int) -> RowPlan | None:
    """Takes rows that are sorted by (source rank, expert) in the order of (expert, source rank)."""
    num_local = recv_GL.shape[1]
    if num_local == 1:
        return None
    expert_of_chunk = torch.arange(num_local, device=recv_GL.device).repeat(len(recv_GL))
    expert_of_row = torch.repeat_interleave(expert_of_chunk, recv_GL.reshape(-1), output_size=num_rows)
    return plan_order(torch.argsort(expert_of_row, stable=True))
