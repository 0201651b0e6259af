"""The router: a linear map from tokens to expert logits, and the choice of a routing rule."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe.modules import routing
from fairseq_moe.modules.routing import RoutingDecision, SecondExpertPolicy

__all__ = ["Router", "RouterConfig", "RouterMode", "RouterOutput"]


class RouterMode(Enum):
    """What the tokens are for; it selects the capacity rule."""

    TRAIN = "train"
    EVAL = "eval"
    GENERATE = "generate"


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens are routed.

    Args:
        top_k: experts per token, 1 or 2.
        gating_use_fp32: softmax and everything after it in float32.
        second_expert_policy: see ``SecondExpertPolicy``; two experts only.
        normalize_before_dropping: weights are normalised before the capacity cut; two experts only.
        batch_prioritized: tokens queue by descending gate probability; two experts only.
        eval_capacity_token_fraction: capacity in evaluation, as a share of the tokens; <= 0: training rule.
        generation_capacity_token_fraction: the same for incremental decoding; None: nothing is dropped.
    """

    top_k: int = 2
    gating_use_fp32: bool = False
    second_expert_policy: SecondExpertPolicy = SecondExpertPolicy.SAMPLING
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    eval_capacity_token_fraction: float = 0.25
    generation_capacity_token_fraction: float | None = None


class RouterOutput(NamedTuple):
    """What routing yields.

    A tuple that starts with a tensor, because hooks of the kind that fairseq's search for NaNs puts on every
    module look for the first tensor of its output.

    Args:
        gates_TE: gate probabilities, differentiable.
        weights_TK: combine weights, differentiable, in the dtype of the logits.
        decision: who goes where.
    """

    gates_TE: Tensor
    weights_TK: Tensor
    decision: RoutingDecision


class Router(nn.Module):
    """Scores experts by ``x W^T`` and routes by the configured rule.

    Args:
        model_dim: D.
        num_experts: E.
        config: the rule.
    """

    def __init__(self, *, model_dim: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.weight = nn.Linear(model_dim, num_experts, bias=False).weight

    def forward(
        self,
        x_TD: Tensor,
        *,
        mode: RouterMode,
        padding_T: Tensor | None = None,
        decision: RoutingDecision | None = None,
    ) -> RouterOutput:
        """Route tokens.

        Args:
            x_TD: float tokens.
            mode: selects the capacity rule, and whether random numbers may be drawn.
            padding_T: bool, True where a token is padding.
            decision: reuse this decision (a recomputed forward pass) instead of taking one.
        """
        logits_TE = F.linear(x_TD, self.weight)
        gates_TE = routing.gate_probabilities(logits_TE, use_fp32=self.config.gating_use_fp32)
        if decision is None or self._draws_random_numbers(mode):
            # A recomputed pass draws as well: the dropout that follows must see the same random numbers.
            taken = self._decide(logits_TE.to(gates_TE.dtype), gates_TE, mode, padding_T)
            decision = taken if decision is None else decision
        weights_TK = routing.combine_weights(
            gates_TE, decision, normalize_before_dropping=self.config.normalize_before_dropping
        )
        return RouterOutput(gates_TE=gates_TE, weights_TK=weights_TK.to(logits_TE.dtype), decision=decision)

    def _draws_random_numbers(self, mode: RouterMode) -> bool:
        draws = self.config.second_expert_policy is not SecondExpertPolicy.ALL
        return draws and mode is RouterMode.TRAIN and self.config.top_k > 1

    def _decide(
        self, logits_TE: Tensor, gates_TE: Tensor, mode: RouterMode, padding_T: Tensor | None
    ) -> RoutingDecision:
        capacity = self._capacity(gates_TE.shape[0], mode)
        if self.config.top_k == 1:
            return routing.decide_top1(gates_TE, capacity=capacity, padding_T=padding_T)
        return routing.decide_top2(
            logits_TE,
            gates_TE,
            capacity=capacity,
            policy=self.config.second_expert_policy,
            training=mode is RouterMode.TRAIN,
            normalize_before_dropping=self.config.normalize_before_dropping,
            padding_T=padding_T,
            prioritized=self.config.batch_prioritized,
        )

    def _capacity(self, num_tokens: int, mode: RouterMode) -> int | None:
        fraction = None
        if mode is RouterMode.EVAL:
            fraction = self.config.eval_capacity_token_fraction
        elif mode is RouterMode.GENERATE:
            fraction = self.config.generation_capacity_token_fraction
            if fraction is None:
                return None
        return routing.capacity_of(
            num_tokens, self.num_experts, top_k=self.config.top_k, eval_token_fraction=fraction
        )
