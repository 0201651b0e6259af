"""The mixture-of-experts layer: route, dispatch, apply the experts, combine."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_moe.modules.dispatch.alltoall import Dispatcher
from fairseq_moe.modules.dispatch.exchange import ExchangeTimes
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.recompute import recomputed, recomputed_first
from fairseq_moe.modules.routing import stats
from fairseq_moe.modules.routing.branch import BranchConfig
from fairseq_moe.modules.routing.contract import LOSSES, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.router import Router, RouterOutput
from fairseq_moe.modules.shared_experts import SharedExperts

__all__ = ["MoEAux", "MoELayer", "RoutingMemo"]


@dataclass(frozen=True, kw_only=True)
class MoEAux:
    """What a layer says besides its output; all tensors, so that activation checkpointing carries them.

    Args:
        losses: float (len(rules.LOSSES),), unscaled, differentiable; 0 for losses that the rule does not have.
        stats: float (len(stats.LAYER_STATS),), no gradient.
        load_2E: float, tokens per expert before (row 0) and after (row 1) the capacity cut, no gradient.
    """

    losses: Tensor
    stats: Tensor
    load_2E: Tensor

    @property
    def balance_loss(self) -> Tensor:
        """The moe branch's loss: float scalar."""
        return self.losses[LOSSES.index("balance")]


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
        shared_experts: a network that every token passes besides its experts.
        record_exchange_times: measure the exchanges of each forward pass (synchronises the device).
        recompute: compute the layer again in the backward pass, all but the choice of experts.
    """

    def __init__(
        self,
        *,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        shared_experts: SharedExperts | None = None,
        record_exchange_times: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.shared_experts = shared_experts
        self.record_exchange_times = record_exchange_times
        self.recompute = recompute

    def forward(
        self, x_TD: Tensor, *, tokens: TokenInfo, memo: RoutingMemo | None = None
    ) -> tuple[Tensor, MoEAux]:
        """Mix the experts' outputs for each token.

        Args:
            x_TD: float tokens.
            tokens: what they are for; padding takes no capacity and its output is that of the shared experts.
            memo: filled by the first pass, obeyed by the second, where the caller recomputes the layer; then
                the layer itself does not.

        Returns:
            (T, D) and the auxiliary outputs.
        """
        if not self.recompute or memo is not None:
            return self._mix(x_TD, tokens, memo)
        memo = RoutingMemo()

        def mix(x_TD: Tensor) -> tuple[Tensor, MoEAux]:
            y_TD, aux = self._mix(x_TD, tokens, memo)
            return recomputed_first(y_TD), aux

        output: tuple[Tensor, MoEAux] = recomputed(mix, x_TD)
        return output

    def _mix(self, x_TD: Tensor, tokens: TokenInfo, memo: RoutingMemo | None) -> tuple[Tensor, MoEAux]:
        remembered = None if memo is None else memo.decision
        routed = self.router(x_TD, tokens=tokens, decision=remembered)
        if memo is not None:
            memo.decision = routed.decision
        times = ExchangeTimes(enabled=self.record_exchange_times)
        shared_TD: list[Tensor] = []

        def apply_shared_experts() -> None:
            if self.shared_experts is not None:
                shared_TD.append(self.shared_experts(x_TD))

        source_SD, work, record = self.dispatcher.dispatch(
            x_TD, routed.decision, routed.weights_TK, times, meanwhile=apply_shared_experts
        )
        y_SD = self.experts(source_SD, work)
        y_TD = sum(shared_TD, self.dispatcher.combine(y_SD, record, times))
        return y_TD, self._aux(routed, tokens, times)

    def _aux(self, routed: RouterOutput, tokens: TokenInfo, times: ExchangeTimes) -> MoEAux:
        # The branch's gates log padding, too, as the branch does.
        is_branch = isinstance(self.router.config, BranchConfig)
        with torch.no_grad():
            layer_stats = stats.layer_stats(
                routed.gates_TE.detach(),
                routed.decision,
                all_to_all_cpu_time_ms=times.cpu_ms,
                all_to_all_cuda_time_ms=times.cuda_ms,
                bias_E=self.router.expert_bias,
                padding_T=None if is_branch else tokens.padding_T,
            )
            load_2E = stats.expert_load(routed.decision, num_experts=self.router.num_experts)
        zero = torch.zeros((), device=layer_stats.device)
        return MoEAux(
            losses=torch.stack([routed.losses.get(name, zero) for name in LOSSES]),
            stats=layer_stats,
            load_2E=load_2E,
        )
