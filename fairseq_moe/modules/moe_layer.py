"""The mixture-of-experts layer: route, dispatch, apply the experts, combine."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_moe.modules import stats
from fairseq_moe.modules.dispatch import Dispatcher
from fairseq_moe.modules.exchange import ExchangeTimes
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.losses import balance_loss
from fairseq_moe.modules.router import Router, RouterMode, RouterOutput
from fairseq_moe.modules.routing import RoutingDecision

__all__ = ["MoEAux", "MoELayer", "RoutingMemo"]


@dataclass(frozen=True, kw_only=True)
class MoEAux:
    """What a layer says besides its output; all tensors, so that activation checkpointing carries them.

    Args:
        balance_loss: float scalar, unscaled, differentiable.
        stats: float (len(stats.LAYER_STATS),), no gradient.
        load_2E: float, tokens per expert before (row 0) and after (row 1) the capacity cut, no gradient.
    """

    balance_loss: Tensor
    stats: Tensor
    load_2E: Tensor


class RoutingMemo:
    """Keeps one forward pass's routing decision for its recomputation under activation checkpointing.

    Rounding differs between two passes on some hardware, and a near-tie that falls the other way would change
    the exchange's split sizes on one rank only: so the choice is remembered, not taken again.
    """

    def __init__(self) -> None:
        self.decision: RoutingDecision | None = None


class MoELayer(nn.Module):
    """A router and this rank's experts.

    Args:
        router: chooses experts for tokens.
        experts: the local ones.
        dispatcher: brings rows to experts and back.
        record_exchange_times: measure the exchanges of each forward pass (synchronises the device).
    """

    def __init__(
        self, *, router: Router, experts: Experts, dispatcher: Dispatcher, record_exchange_times: bool = False
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.record_exchange_times = record_exchange_times

    def forward(
        self,
        x_TD: Tensor,
        *,
        mode: RouterMode,
        padding_T: Tensor | None = None,
        memo: RoutingMemo | None = None,
    ) -> tuple[Tensor, MoEAux]:
        """Mix the experts' outputs for each token.

        Args:
            x_TD: float tokens.
            mode: training, evaluation or generation.
            padding_T: bool, True where a token is padding: it takes no capacity and its output is 0.
            memo: filled by the first pass, obeyed by the second.

        Returns:
            (T, D) and the auxiliary outputs.
        """
        remembered = None if memo is None else memo.decision
        routed = self.router(x_TD, mode=mode, padding_T=padding_T, decision=remembered)
        if memo is not None:
            memo.decision = routed.decision
        times = ExchangeTimes(enabled=self.record_exchange_times)
        rows, record = self.dispatcher.dispatch(x_TD, routed.decision, times)
        y_RD = self.experts(rows, record.local_counts_L)
        y_TD = self.dispatcher.combine(y_RD, routed.weights_TK, record, times)
        return y_TD, self._aux(routed, times)

    def _aux(self, routed: RouterOutput, times: ExchangeTimes) -> MoEAux:
        with torch.no_grad():
            layer_stats = stats.layer_stats(
                routed.gates_TE.detach(),
                routed.decision,
                all_to_all_cpu_time_ms=times.cpu_ms,
                all_to_all_cuda_time_ms=times.cuda_ms,
            )
            load_2E = stats.expert_load(routed.decision, num_experts=self.router.num_experts)
        return MoEAux(
            balance_loss=balance_loss(routed.gates_TE, routed.decision), stats=layer_stats, load_2E=load_2E
        )
