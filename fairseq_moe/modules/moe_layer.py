"""Compose the mixture-of-experts layer: route, dispatch, apply the experts, combine."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_moe.modules.dispatch.dispatcher import Dispatcher
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
    """Carry what a layer says besides its output; all tensors, so that activation checkpointing passes them on.

    Args:
        losses: float (len(contract.LOSSES),), unscaled, differentiable; 0 for losses that the rule does not have.
        stats: float (len(stats.LAYER_STATS),), no gradient.
        load_2E: float, requested and kept assignments of each expert, no gradient.
    """

    losses: Tensor
    stats: Tensor
    load_2E: Tensor

    @property
    def balance_loss(self) -> Tensor:
        """The moe branch's loss: float scalar."""
        return self.losses[LOSSES.index("balance")]


class RoutingMemo:
    """Keep one forward pass's routing decision for its recomputation under activation checkpointing.

    Rounding differs between two passes on some hardware, and a near-tie that falls the other way would change
    the exchange's split sizes on one rank only: so the choice is remembered, not taken again.
    """

    def __init__(self) -> None:
        self.decision: RoutingDecision | None = None


class MoELayer(nn.Module):
    """Route tokens, and mix the outputs of the experts that they chose.

    Args:
        router: chooses experts for tokens.
        experts: the local ones.
        dispatcher: brings rows to experts and back.
        shared_experts: a network that every token passes besides its experts.
        exchange_times: what the dispatcher's ``TimedExchange`` measures, for the statistics; None: it has none.
        recompute: compute the layer again in the backward pass, all but the choice of experts.
    """

    def __init__(
        self,
        *,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        shared_experts: SharedExperts | None = None,
        exchange_times: ExchangeTimes | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.shared_experts = shared_experts
        self.exchange_times = exchange_times or ExchangeTimes()
        self.recompute = recompute

    def forward(
        self, x_TD: Tensor, *, tokens: TokenInfo, memo: RoutingMemo | None = None
    ) -> tuple[Tensor, MoEAux]:
        """Mix the experts' outputs for each token.

        Args:
            x_TD: float tokens.
            tokens: mode and padding of the tokens; padding takes no slot, and its output is that of the shared
                experts.
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
        self.exchange_times.reset()
        dispatched = self.dispatcher.send(x_TD, routed.decision, routed.weights_TK)
        # Computed while the rows travel.
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        source_SD, work = dispatched.arrive()
        y_SD = self.experts(source_SD, work)
        y_TD = dispatched.combine(y_SD)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD, self._aux(routed, tokens)

    def _aux(self, routed: RouterOutput, tokens: TokenInfo) -> MoEAux:
        counts = routed.decision.counts
        # The branch's gates log padding, too, as the branch does.
        is_branch = isinstance(self.router.config, BranchConfig)
        with torch.no_grad():
            layer_stats = stats.layer_stats(
                routed.gates_TE.detach(),
                counts,
                top_k=routed.weights_TK.shape[1],
                all_to_all_cpu_time_ms=self.exchange_times.cpu_ms,
                all_to_all_cuda_time_ms=self.exchange_times.cuda_ms,
                bias_E=self.router.expert_bias,
                padding_T=None if is_branch else tokens.padding_T,
            )
            load_2E = torch.stack([counts.requested_E, counts.kept_E]).float()
        zero = torch.zeros((), device=layer_stats.device)
        return MoEAux(
            losses=torch.stack([routed.losses.get(name, zero) for name in LOSSES]),
            stats=layer_stats,
            load_2E=load_2E,
        )
