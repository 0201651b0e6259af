"""Dispatch by gathering: every rank sees all tokens of its group and keeps those of its own experts.

It moves every token to every rank, so it costs more than all-to-all unless most tokens go to most ranks (large
K, few ranks). Results are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe.modules.dispatch.exchange import Exchange, ExchangeTimes
from fairseq_moe.modules.dispatch.rows import ExpertWork, count_rows, plan_rows, take_weights
from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = ["AllGatherDispatcher", "GatherRecord"]


@dataclass(frozen=True, kw_only=True)
class GatherRecord:
    """What ``combine`` needs.

    Args:
        sizes: tokens of each of the G ranks.
        num_tokens: T, tokens of this rank.
    """

    sizes: list[int]
    num_tokens: int


class AllGatherDispatcher:
    """Moves tokens through an exchange; holds no parameters.

    Args:
        exchange: the ranks around this one.
        num_experts: E.
        first_expert_id: global id of the first local expert.
    """

    def __init__(self, exchange: Exchange, *, num_experts: int, first_expert_id: int) -> None:
        self.exchange = exchange
        self.num_local = num_experts // exchange.size
        self.first_expert_id = first_expert_id

    def dispatch(
        self,
        x_TD: Tensor,
        decision: RoutingDecision,
        weights_TK: Tensor,
        times: ExchangeTimes,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[Tensor, ExpertWork, GatherRecord]:
        """As ``Dispatcher.dispatch``."""
        num_ranks, num_tokens = self.exchange.size, len(x_TD)
        here = torch.full((num_ranks, 1), num_tokens, dtype=torch.int64, device=x_TD.device)
        sizes = self.exchange.counts(here).view(-1).tolist()
        gathered = self._gather(x_TD, sizes, times, meanwhile=meanwhile)
        # Dropped assignments and those of other ranks get the id one past the local experts.
        local_ids = decision.expert_ids_TK.masked_fill(~decision.kept_TK, -1)
        local_ids = self._gather(local_ids, sizes, times) - self.first_expert_id
        is_local = (local_ids >= 0) & (local_ids < self.num_local)
        mine = RoutingDecision(
            expert_ids_TK=local_ids.masked_fill(~is_local, self.num_local),
            wanted_TK=is_local,
            kept_TK=is_local,
            capacity=None,
        )
        counts_L = count_rows(mine, num_experts=self.num_local).tolist()
        plan = plan_rows(mine, num_experts=self.num_local, num_rows=sum(counts_L))
        weights_R = take_weights(self._gather(weights_TK, sizes, times), plan)
        work = ExpertWork(counts_L=counts_L, plan=plan, weights_R=weights_R)
        return gathered, work, GatherRecord(sizes=sizes, num_tokens=num_tokens)

    def combine(self, y_SD: Tensor, record: GatherRecord, times: ExchangeTimes) -> Tensor:
        """Add up what the ranks' experts have made of each token: (tokens of all ranks, D) -> (T, D)."""
        if self.exchange.size == 1:
            return y_SD
        back = [record.num_tokens] * self.exchange.size
        parts = times.measure(self.exchange.rows, y_SD, record.sizes, back)
        return parts.view(self.exchange.size, record.num_tokens, parts.shape[1]).sum(0)

    def _gather(
        self,
        x_TX: Tensor,
        sizes: list[int],
        times: ExchangeTimes,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """All ranks' rows, in rank order; the gradient of a row is the sum over the ranks that saw it."""
        num_ranks = self.exchange.size
        return times.measure(
            self.exchange.rows,
            x_TX if num_ranks == 1 else x_TX.repeat(num_ranks, 1),
            [len(x_TX)] * num_ranks,
            sizes,
            meanwhile=meanwhile,
        )
