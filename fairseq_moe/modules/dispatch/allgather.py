"""Dispatch by gathering: every rank sees all tokens of its group and keeps those of its own experts.

Every token travels to every rank, once, so it costs more than all-to-all unless most tokens go to most ranks (large
K, few ranks). Results are the same. Where ranks bring different numbers of tokens, all send as many as the longest;
what is sent beyond a rank's tokens is chosen by no expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.dispatcher import Dispatched
from fairseq_moe.modules.dispatch.exchange import Exchange, Transfer
from fairseq_moe.modules.dispatch.rows import ExpertWork, plan_rows, take_weights
from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = ["AllGatherDispatcher"]


class AllGatherDispatcher:
    """Bring all tokens of the group to every rank.

    Where ranks hold parts of experts, the sum over ranks adds these up, too.

    Args:
        exchange: the ranks around this one.
        first_expert_id: global id of the first local expert.
        parts: ranks that share an expert.
    """

    def __init__(self, exchange: Exchange, *, first_expert_id: int, parts: int = 1) -> None:
        self.exchange = exchange
        self.first_expert_id = first_expert_id
        self.parts = parts

    def send(self, x_TD: Tensor, decision: RoutingDecision, weights_TK: Tensor) -> Dispatched:
        """Send the tokens to every rank; ids and weights follow when these arrive."""
        here = torch.full((self.exchange.size, 1), len(x_TD), dtype=torch.int64, device=x_TD.device)
        longest = max(self.exchange.counts(here).view(-1).tolist())
        return _Gathering(
            dispatcher=self,
            decision=decision,
            weights_TK=weights_TK,
            longest=longest,
            transfer=self.gather(x_TD, longest),
        )

    def gather(self, values: Tensor, longest: int, *, filler: float = 0) -> Transfer:
        """Bring the values of all ranks' tokens, in rank order, ``longest`` rows of each."""
        missing = longest - len(values)
        return self.exchange.gather(F.pad(values, (0, 0, 0, missing), value=filler) if missing else values)


@dataclass(frozen=True, kw_only=True)
class _Gathering:
    """Tokens on their way to every rank.

    Args:
        dispatcher: brings their experts and weights, too, and takes outputs back.
        decision: this rank's routing.
        weights_TK: float, its weights.
        longest: rows of each of the G ranks.
        transfer: the tokens.
    """

    dispatcher: AllGatherDispatcher
    decision: RoutingDecision
    weights_TK: Tensor
    longest: int
    transfer: Transfer

    def arrive(self) -> tuple[Tensor, ExpertWork]:
        source_SD = self.transfer.arrive()
        gather = self.dispatcher.gather
        num_local = self.decision.num_experts * self.dispatcher.parts // self.dispatcher.exchange.size
        chosen_TK = self.decision.expert_ids_TK.masked_fill(~self.decision.kept_TK, -1)
        local_ids = gather(chosen_TK, self.longest, filler=-1).arrive() - self.dispatcher.first_expert_id
        is_local = (local_ids >= 0) & (local_ids < num_local)
        mine = RoutingDecision.counted(
            expert_ids_TK=local_ids.masked_fill(~is_local, 0),
            requested_TK=is_local,
            kept_TK=is_local,
            num_experts=num_local,
            capacity=None,
        )
        plan = plan_rows(mine)
        weights_R = take_weights(gather(self.weights_TK, self.longest).arrive(), plan)
        return source_SD, ExpertWork(counts_L=mine.counts.kept_E, plan=plan, weights_R=weights_R)

    def combine(self, y_SD: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Add up what the ranks' experts have made of each token: (G * longest, D) -> (T, D)."""
        return self.dispatcher.exchange.scatter_sum(y_SD).arrive()[: len(self.weights_TK)]
