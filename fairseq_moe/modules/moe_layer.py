"""Compose the mixture-of-experts layer: route, dispatch, apply the experts, combine."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_moe.modules.dispatch.dispatcher import Dispatcher
from fairseq_moe.modules.dispatch.exchange import ExchangeTimes
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.recompute import recomputed, recomputed_first
from fairseq_moe.modules.routing import stats
from fairseq_moe.modules.routing.contract import LOSSES, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.router import Router, RouterOutput
from fairseq_moe.modules.shared_experts import SharedExperts

__all__ = ["MoEAux", "MoELayer", "RoutingMemo"]


@dataclass(frozen=True, kw_only=True)
class MoEAux:
    """Carry what a layer says besides its output; all tensors, so that activation checkpointing passes them on.

    Args:
        losses: float (len(contract.LOSSES),), unscaled, differentiable; 0 for losses that the rule does not have. Where
            other ranks have tokens of the same micro-batch, this rank's shares, until ``whole_auxes`` adds them up.
        histogram_34E: int64, of the micro-batch's assignments, on all ranks that have tokens of it, as in
            ``AssignmentCounts``.
        measures_4: float32 (len(stats.MEASURES),), no gradient. ``stats.layer_stats`` makes statistics of these and
            of histograms, for all layers together.
    """

    losses: Tensor
    histogram_34E: Tensor
    measures_4: Tensor

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
        dropout: of each expert's output, where the experts cannot drop it because they give parts of it.
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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
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
        y_TD = dispatched.combine(y_SD, dropout=self.dropout if self.training else 0.0)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD, self._aux(routed)

    def _aux(self, routed: RouterOutput) -> MoEAux:
        decision, entropy_T = routed.decision, routed.entropy_T
        if entropy_T is None:
            entropy_T = stats.gate_entropy(routed.gates_TE.detach(), left_out_T=decision.left_out_T)
        measures_4 = stats.layer_measures(
            entropy_T,
            all_to_all_cpu_time_ms=self.exchange_times.cpu_ms,
            all_to_all_cuda_time_ms=self.exchange_times.cuda_ms,
            bias_E=self.router.expert_bias,
        )
        zero = torch.zeros((), device=measures_4.device)
        return MoEAux(
            losses=torch.stack([routed.losses.get(name, zero) for name in LOSSES]),
            histogram_34E=(decision.micro_batch or decision).counts.histogram_34E,
            measures_4=measures_4,
        )
