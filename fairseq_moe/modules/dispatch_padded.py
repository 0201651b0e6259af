"""Dispatch at fixed shapes: every expert gets exactly its capacity in rows from every rank, filled with zeros.

Filler rows have weight 0 and touch no result and no gradient. Where the largest batch is known, every rank
sends the places of that batch, so sizes do not depend on the data, the exchange has even splits and nothing
waits for the device; elsewhere the ranks first tell each other their capacities.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.dispatch import Dispatcher, DispatchRecord
from fairseq_moe.modules.exchange import Exchange, ExchangeTimes
from fairseq_moe.modules.permute import ExpertWork, RowPlan, plan_order
from fairseq_moe.modules.routing import RoutingDecision, queue_positions

__all__ = ["PaddedDispatcher", "PaddedRecord"]


@dataclass(frozen=True, kw_only=True)
class PaddedRecord:
    """What ``combine`` needs.

    Args:
        slot_A: int64, place of each (token, choice) pair among the E * C rows; E * C where it was dropped.
        weights_TK: float, of each choice.
        send_splits: rows sent to each of the G ranks.
        recv_splits: rows received from each.
    """

    slot_A: Tensor
    weights_TK: Tensor
    send_splits: list[int]
    recv_splits: list[int]


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
        slot_A = _slots(decision, self.num_experts, places)
        token_A = torch.arange(slot_A.numel(), device=x_TD.device) // decision.expert_ids_TK.shape[1]
        num_slots = self.num_experts * places
        buffer = x_TD.new_zeros((num_slots + 1, x_TD.shape[1]))  # the last row takes what was dropped
        buffer = buffer.index_copy(0, slot_A, x_TD.index_select(0, token_A))
        places_G = self._places_of_ranks(places, decision, x_TD.device)
        record = PaddedRecord(
            slot_A=slot_A,
            weights_TK=weights_TK,
            send_splits=[self.num_local * places] * self.exchange.size,
            recv_splits=[self.num_local * theirs for theirs in places_G],
        )
        rows = times.measure(
            self.exchange.rows,
            buffer[:num_slots],
            record.send_splits,
            record.recv_splits,
            meanwhile=meanwhile,
        )
        work = ExpertWork(
            counts_L=[sum(places_G)] * self.num_local,
            plan=self._expert_major(places_G, x_TD.device),
            rows_per_expert=sum(places_G),
        )
        return rows, work, record

    def combine(
        self, y_RD: Tensor, record: PaddedRecord | DispatchRecord | None, times: ExchangeTimes
    ) -> Tensor:
        """As ``Dispatcher.combine``."""
        if not isinstance(record, PaddedRecord):
            return self.unpadded.combine(y_RD, record, times)
        rows = times.measure(self.exchange.rows, y_RD, record.recv_splits, record.send_splits)
        rows = torch.cat([rows, rows.new_zeros((1, rows.shape[1]))])
        y_TKD = rows.index_select(0, record.slot_A).view(*record.weights_TK.shape, rows.shape[1])
        return torch.einsum("tkd,tk->td", y_TKD, record.weights_TK.to(y_TKD.dtype))

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


def _slots(decision: RoutingDecision, num_experts: int, places: int) -> Tensor:
    """expert * C + place among the expert's kept pairs, in token order; E * C for pairs that were dropped."""
    ids_A1, kept_A1 = decision.expert_ids_TK.reshape(-1, 1), decision.kept_TK.reshape(-1, 1)
    position_A1 = queue_positions(ids_A1, kept_A1, num_experts=num_experts)
    return torch.where(kept_A1, ids_A1 * places + position_A1, num_experts * places).reshape(-1)
