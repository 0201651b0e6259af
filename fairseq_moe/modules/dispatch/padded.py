"""Dispatch at fixed shapes: every expert gets exactly its capacity in rows from every rank, filled with zeros.

The filler is one more token, of zeros and with weight 0, that touches no result and no gradient. Where the largest
batch is known, every rank sends the places of that batch, so sizes do not depend on the data, the exchange has even
splits and nothing waits for the device; elsewhere the ranks first tell each other their capacities.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.alltoall import Dispatcher, DispatchRecord
from fairseq_moe.modules.dispatch.exchange import Exchange, ExchangeTimes
from fairseq_moe.modules.dispatch.rows import ExpertWork, RowPlan, plan_order, take_rows, take_weights
from fairseq_moe.modules.routing.contract import RoutingDecision, count_ids, queue_positions

__all__ = ["PaddedDispatcher", "PaddedRecord"]


class PaddedRecord(NamedTuple):
    """What ``combine`` needs.

    Args:
        places: how the places of all experts are filled, and what was sent; None: nothing was.
        num_tokens: T. One token more is read and written, of zeros, for the places that stay empty.
    """

    places: DispatchRecord | None
    num_tokens: int


class PaddedDispatcher:
    """Moves rows through an exchange; holds no parameters.

    Args:
        exchange: the ranks around this one.
        num_experts: E.
    """

    def __init__(self, exchange: Exchange, *, num_experts: int) -> None:
        self.exchange = exchange
        self.num_experts = num_experts
        self.num_local = num_experts // exchange.size
        self.unpadded = Dispatcher(exchange, num_experts=num_experts)

    def dispatch(
        self,
        x_TD: Tensor,
        decision: RoutingDecision,
        weights_TK: Tensor,
        times: ExchangeTimes,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[Tensor, ExpertWork, PaddedRecord | DispatchRecord | None]:
        """As ``Dispatcher.dispatch``; without a capacity (generation) there is nothing to pad to."""
        if decision.capacity is None:
            return self.unpadded.dispatch(x_TD, decision, weights_TK, times, meanwhile=meanwhile)
        places = decision.capacity if decision.num_places is None else decision.num_places
        plan = _fill_places(decision, num_experts=self.num_experts, places=places)
        places_G = self._places_of_ranks(places, decision, x_TD.device)
        source_SD = F.pad(x_TD, (0, 0, 0, 1))
        weights_R = take_weights(F.pad(weights_TK, (0, 0, 0, 1)), plan)
        work = ExpertWork(
            counts_L=[sum(places_G)] * self.num_local,
            plan=plan,
            weights_R=weights_R,
            rows_per_expert=sum(places_G),
        )
        send_splits = [self.num_local * places] * self.exchange.size
        if self.exchange.size == 1:
            source_SD = self.exchange.rows(source_SD, send_splits, send_splits, meanwhile=meanwhile)
            return source_SD, work, PaddedRecord(None, len(x_TD))
        record = DispatchRecord(
            plan=plan,
            weights_R=weights_R,
            send_splits=send_splits,
            recv_splits=[self.num_local * theirs for theirs in places_G],
        )
        rows = take_rows(source_SD, plan)
        rows = times.measure(self.exchange.rows, rows, send_splits, record.recv_splits, meanwhile=meanwhile)
        work = replace(work, plan=self._expert_major(places_G, x_TD.device), weights_R=None)
        return rows, work, PaddedRecord(record, len(x_TD))

    def combine(
        self, y_SD: Tensor, record: PaddedRecord | DispatchRecord | None, times: ExchangeTimes
    ) -> Tensor:
        """As ``Dispatcher.combine``."""
        if not isinstance(record, PaddedRecord):
            return self.unpadded.combine(y_SD, record, times)
        return self.unpadded.combine(y_SD, record.places, times)[: record.num_tokens]

    def _places_of_ranks(self, places: int, decision: RoutingDecision, device: torch.device) -> list[int]:
        num_ranks = self.exchange.size
        if decision.num_places is not None or num_ranks == 1:
            return [places] * num_ranks
        mine = torch.full((num_ranks, 1), places, dtype=torch.int64, device=device)
        return self.exchange.counts(mine).view(-1).tolist()

    def _expert_major(self, places_G: list[int], device: torch.device) -> RowPlan | None:
        """Takes rows that are sorted by (source rank, expert) in the order of (expert, source rank)."""
        if len(places_G) == 1 or self.num_local == 1:
            return None
        chunks, first = [], 0
        for places in places_G:
            chunk = torch.arange(first, first + self.num_local * places, device=device)
            chunks.append(chunk.view(self.num_local, places))
            first += self.num_local * places
        return plan_order(torch.cat(chunks, dim=1).reshape(-1))


def _fill_places(decision: RoutingDecision, *, num_experts: int, places: int) -> RowPlan:
    """C places for each expert as rows of T + 1 tokens, the last of which stands in every place that stays empty.

    An expert's kept tokens take its places in their order.
    """
    num_tokens, top_k = decision.expert_ids_TK.shape
    ids_A1, kept_A1 = decision.expert_ids_TK.reshape(-1, 1), decision.kept_TK.reshape(-1, 1)
    position_A1 = queue_positions(ids_A1, kept_A1, num_experts=num_experts)
    num_places = num_experts * places
    # What was dropped goes to one more place, which is cut off.
    place_A = torch.where(kept_A1, ids_A1 * places + position_A1, num_places).view(-1)
    assignments_A = torch.arange(len(place_A), device=place_A.device)
    assignment_R = place_A.new_full((num_places + 1,), len(place_A)).scatter_(0, place_A, assignments_A)
    assignment_R = assignment_R[:num_places]
    token_R = assignment_R // top_k
    ends_T = count_ids(token_R, size=num_tokens + 1).cumsum(0)
    return RowPlan(
        assignment_R=assignment_R,
        token_R=token_R,
        by_token_R=torch.argsort(token_R, stable=True),
        starts_T=F.pad(ends_T[:-1], (1, 0)),
    )
