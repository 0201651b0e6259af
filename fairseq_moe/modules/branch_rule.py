"""The gates of fairseq's moe branch: top-1 and top-2 with its capacity rule and balance loss."""

from dataclasses import dataclass

from torch import Tensor

from fairseq_moe.modules import routing
from fairseq_moe.modules.losses import balance_loss
from fairseq_moe.modules.routing import RoutingDecision, SecondExpertPolicy
from fairseq_moe.modules.rules import RouterMode, RouterOutput, TokenInfo

__all__ = ["BranchRule", "RouterConfig"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How the branch's gates route.

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


class BranchRule:
    """See ``RouterConfig`` and ``modules/routing.py``."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config

    def route(self, logits_TE: Tensor, tokens: TokenInfo, decision: RoutingDecision | None) -> RouterOutput:
        """See ``RoutingRule``."""
        gates_TE = routing.gate_probabilities(logits_TE, use_fp32=self.config.gating_use_fp32)
        if decision is None or self._draws_random_numbers(tokens.mode):
            # A recomputed pass draws as well: the dropout that follows must see the same random numbers.
            taken = self._decide(logits_TE.to(gates_TE.dtype), gates_TE, tokens)
            decision = taken if decision is None else decision
        weights_TK = routing.combine_weights(
            gates_TE, decision, normalize_before_dropping=self.config.normalize_before_dropping
        )
        return RouterOutput(
            gates_TE=gates_TE,
            weights_TK=weights_TK.to(logits_TE.dtype),
            decision=decision,
            losses={"balance": balance_loss(gates_TE, decision)},
        )

    def _draws_random_numbers(self, mode: RouterMode) -> bool:
        draws = self.config.second_expert_policy is not SecondExpertPolicy.ALL
        return draws and mode is RouterMode.TRAIN and self.config.top_k > 1

    def _decide(self, logits_TE: Tensor, gates_TE: Tensor, tokens: TokenInfo) -> RoutingDecision:
        capacity = self._capacity(gates_TE.shape[0], gates_TE.shape[1], tokens.mode)
        if self.config.top_k == 1:
            return routing.decide_top1(gates_TE, capacity=capacity, padding_T=tokens.padding_T)
        return routing.decide_top2(
            logits_TE,
            gates_TE,
            capacity=capacity,
            policy=self.config.second_expert_policy,
            training=tokens.mode is RouterMode.TRAIN,
            normalize_before_dropping=self.config.normalize_before_dropping,
            padding_T=tokens.padding_T,
            prioritized=self.config.batch_prioritized,
        )

    def _capacity(self, num_tokens: int, num_experts: int, mode: RouterMode) -> int | None:
        fraction = None
        if mode is RouterMode.EVAL:
            fraction = self.config.eval_capacity_token_fraction
        elif mode is RouterMode.GENERATE:
            fraction = self.config.generation_capacity_token_fraction
            if fraction is None:
                return None
        return routing.capacity_of(
            num_tokens, num_experts, top_k=self.config.top_k, eval_token_fraction=fraction
        )
