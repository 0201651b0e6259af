"""Compute expert logits for tokens, and hand them to a routing rule.

Two scorers: a linear map, and X-MoE's cosine between a projected token and expert embeddings (Chi et al.
2022, arXiv 2204.09179). The expert bias of auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664)
lives here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule, quantile_thresholds, sign_step
from fairseq_moe.modules.routing.branch import BranchConfig, BranchRule
from fairseq_moe.modules.routing.contract import (
    RouterMode,
    RouterOutput,
    RoutingDecision,
    RoutingRule,
    TokenInfo,
)
from fairseq_moe.modules.routing.micro_batch import gather_scores
from fairseq_moe.modules.routing.scores import choice_scores
from fairseq_moe.modules.routing.topk import TopKConfig, TopKRule
from fairseq_moe.modules.shards import LocalShards, Shards

__all__ = ["BranchConfig", "Router", "RouterMode", "RouterOutput", "ScorerConfig"]

_FLOAT32_BUFFERS = ("expert_bias", "thresholds")
_COSINE_DIM = 16
_COSINE_NORM = 1.5  # of expert embeddings at the start; only their direction matters


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Configure how logits are computed.

    Args:
        cosine: X-MoE's scorer in place of the linear map.
        dtype: precision of the product; None: that of the tokens.
        jitter_eps: while training the router's input is multiplied by uniform(1 - eps, 1 + eps); None: not.
        bias: the linear map has a learned bias, of logits: weights and losses see it, as they do not see the balancing
            ``expert_bias``.
    """

    cosine: bool = False
    dtype: torch.dtype | None = None
    jitter_eps: float | None = None
    bias: bool = False


class Router(nn.Module):
    """Score experts and route by the configured rule.

    Args:
        model_dim: D.
        num_experts: E.
        config: the rule, of the moe branch or of the top-k family.
        scorer: how logits are computed.
        balance: how the expert bias follows the load; None: no expert bias.
        sum_over_ranks: adds up a vector over all ranks, in place (None: a single process); used by the
            global balance loss on every training pass and by the expert bias once per update.
        shards: joins the ranks that have tokens of the same micro-batch; None: this rank has all.
    """

    weight: Tensor
    bias: nn.Parameter | None
    projection: Tensor
    expert_bias: Tensor | None
    thresholds: Tensor
    local_counts_E: Tensor
    global_counts_E: Tensor

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        config: BranchConfig | TopKConfig,
        scorer: ScorerConfig | None = None,
        balance: BiasConfig | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.scorer = scorer or ScorerConfig()
        self.balance = balance
        self.sum_over_ranks = sum_over_ranks or (lambda counts: counts)
        self.shards = shards or LocalShards()
        if self.scorer.cosine:
            self.projection = nn.Linear(model_dim, _COSINE_DIM, bias=False).weight
            self.weight = nn.Parameter(torch.empty(num_experts, _COSINE_DIM))
            if not self.weight.is_meta:
                nn.init.orthogonal_(self.weight)
                with torch.no_grad():
                    self.weight.copy_(_COSINE_NORM * F.normalize(self.weight, dim=-1))
        else:
            self.weight = nn.Linear(model_dim, num_experts, bias=False).weight
        self.bias = nn.Parameter(torch.zeros(num_experts)) if self.scorer.bias else None
        self.register_buffer("expert_bias", None if balance is None else torch.zeros(num_experts))
        # Sum of the quantile rule's thresholds over the update's passes (E,), and their number (last).
        self.register_buffer("thresholds", torch.zeros(num_experts + 1), persistent=False)
        # Choices since the update began, before drops: here, and on all ranks. They are not saved.
        self.register_buffer("local_counts_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("global_counts_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.rule: RoutingRule
        if isinstance(config, TopKConfig):
            self.rule = TopKRule(config, global_counts=self._count_globally, shards=self.shards)
        else:
            self.rule = BranchRule(config, shards=self.shards)

    def forward(
        self,
        x_TD: Tensor,
        *,
        tokens: TokenInfo,
        decision: RoutingDecision | None = None,
    ) -> RouterOutput:
        """Route tokens by the configured rule.

        Args:
            x_TD: float tokens.
            tokens: what they are for, which are padding.
            decision: reuse this decision (a recomputed forward pass) instead of taking one.
        """
        logits_TE = self._logits(self._jittered(x_TD, tokens))
        routed = self.rule.route(logits_TE, tokens, decision, bias_E=self.expert_bias)
        if self.balance is not None and decision is None and tokens.mode is RouterMode.TRAIN:
            self._observe(logits_TE.detach(), routed.decision, tokens)
        return routed

    def _observe(self, logits_TE: Tensor, decision: RoutingDecision, tokens: TokenInfo) -> None:
        """Note of this pass what the next bias follows from."""
        assert self.balance is not None
        if self.balance.rule is BiasRule.SIGN:
            self.local_counts_E += decision.counts.requested_E
            return
        assert isinstance(self.config, TopKConfig) and self.expert_bias is not None
        scores_TE, padding_T = choice_scores(logits_TE.float(), self.config.score), tokens.padding_T
        has_tokens = decision.requested_TK.any()
        if decision.micro_batch is not None:  # every one of its ranks notes the same
            scores_TE, padding_T = gather_scores(self.shards, scores_TE, padding_T, decision.micro_batch)
            has_tokens = decision.micro_batch.num_valid > 0
        found_E = quantile_thresholds(
            scores_TE, self.expert_bias, top_k=self.config.top_k, padding_T=padding_T
        )
        self.thresholds += torch.cat([found_E, has_tokens.to(found_E.dtype).view(1)])

    def begin_update(self) -> None:
        """Forget the choices of the last update."""
        self.local_counts_E.zero_()
        self.global_counts_E.zero_()
        self.thresholds.zero_()

    @torch.no_grad()
    def update_bias(self) -> None:
        """Let the expert bias follow the load of the update, if there is one; collective over all ranks.

        The bias of a router whose parameters are frozen is frozen, too.
        """
        if self.balance is None or self.expert_bias is None or not self.weight.requires_grad:
            return
        if self.balance.rule is BiasRule.SIGN:
            counts_E = self.sum_over_ranks(self.local_counts_E.clone())
            self.expert_bias += sign_step(counts_E, rate=self.balance.update_rate)
        else:
            *sums, passes = self.sum_over_ranks(self.thresholds.clone()).split([self.num_experts, 1])
            mean_E = sums[0] / passes.clamp(min=1)
            self.expert_bias = torch.where(passes > 0, mean_E.mean() - mean_E, self.expert_bias)

    def set_num_updates(self, num_updates: int) -> None:
        """Pass on how many updates are done, which fairseq tells every module; the capacity schedule goes by it."""
        self.rule.set_num_updates(num_updates)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Bias and thresholds stay float32 when a model is converted: the bias's steps are small."""
        before = {name: getattr(self, name) for name in _FLOAT32_BUFFERS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and not value.is_meta:
                self._buffers[name] = value.to(getattr(self, name).device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """FSDP casts buffers by assignment before every pass: of such a value only the device is used."""
        if name in _FLOAT32_BUFFERS and isinstance(value, Tensor) and value.dtype != torch.float32:
            value = getattr(self, name).to(value.device)
        super().__setattr__(name, value)

    def _jittered(self, x_TD: Tensor, tokens: TokenInfo) -> Tensor:
        eps = self.scorer.jitter_eps
        if eps is None or tokens.mode is not RouterMode.TRAIN:
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)

    def _logits(self, x_TD: Tensor) -> Tensor:
        dtype = self.scorer.dtype or x_TD.dtype
        device = x_TD.device.type
        # What was asked for in a dtype is not rounded.
        rounds = self.scorer.dtype is None and torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=rounds):
            return self._products(x_TD, dtype)

    def _products(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.scorer.cosine:
            bias_E = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x_TD.to(dtype), self.weight.to(dtype), bias_E)
        projected = F.linear(x_TD.to(dtype), self.projection.to(dtype))
        projected = projected.to(torch.promote_types(dtype, torch.float32))
        logits_TE = projected @ F.normalize(self.weight.to(projected.dtype), dim=-1, eps=1e-4).t()
        if len(x_TD) == 0:
            return logits_TE.to(dtype)
        finite = torch.isfinite(logits_TE)
        return torch.where(finite, logits_TE, logits_TE.masked_fill(~finite, float("inf")).amin()).to(dtype)

    def _count_globally(self, counts_E: Tensor) -> Tensor:
        self.global_counts_E += self.sum_over_ranks(counts_E.clone())
        return self.global_counts_E.clone()
