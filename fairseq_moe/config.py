"""What the MoE flags mean, as one typed record, and every reason to refuse them.

``MoEConfig`` holds the flags under their fairseq names (``moe_freq`` is ``--moe-freq``). ``moe_problems``
looks at a whole fairseq configuration and returns one sentence per problem, all at once, before data is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fairseq_moe.layout import layout_problem
from fairseq_moe.modules.router import RouterConfig
from fairseq_moe.modules.routing import SecondExpertPolicy
from fairseq_moe.stock_flags import stock_flag_problems

__all__ = ["MoEConfig", "moe_problems"]

_GRAD_DIVISORS = ("world_size", "sqrt_world_size")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The model flags of ``transformer_lm`` that concern experts; see their help texts in ``models``."""

    moe_freq: int = 0
    moe_expert_count: int = 0
    moe_expert_ffn_dim: int | None = None
    moe_top1_expert: bool = False
    moe_gating_use_fp32: bool = False
    moe_second_expert_policy: str = "sampling"
    moe_normalize_gate_prob_before_dropping: bool = False
    moe_batch_prioritized_routing: bool = False
    moe_eval_capacity_token_fraction: float = 0.25
    moe_generation_capacity_token_fraction: float | None = None
    moe_normalize_expert_grad: str = "world_size"
    use_moe_pad_mask: bool = False
    record_a2a_perf_stats: bool = False
    dummy_a2a: bool = False
    alternate_decoder_ffn_embed_dim: int = 0

    @classmethod
    def from_args(cls, args: Any) -> "MoEConfig":
        """Read the fields that ``args`` (namespace, config, mapping) has; the others keep their defaults."""
        get = args.get if isinstance(args, Mapping) else lambda name: getattr(args, name, None)
        found = {field.name: get(field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})

    @property
    def enabled(self) -> bool:
        """Whether any layer has experts."""
        return self.moe_freq > 0 and not self.is_pseudo_moe

    @property
    def is_pseudo_moe(self) -> bool:
        """MoE positions hold dense networks of another width: the branch's equal-FLOPs control."""
        return self.moe_freq > 0 and self.alternate_decoder_ffn_embed_dim > 0

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return 1 if self.moe_top1_expert else 2

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer ``index`` (from 0) is an MoE position."""
        return self.moe_freq > 0 and (index + 1) % self.moe_freq == 0

    def router_config(self) -> RouterConfig:
        """The routing rule these flags ask for."""
        return RouterConfig(
            top_k=self.top_k,
            gating_use_fp32=self.moe_gating_use_fp32,
            second_expert_policy=SecondExpertPolicy(self.moe_second_expert_policy),
            normalize_before_dropping=self.moe_normalize_gate_prob_before_dropping,
            batch_prioritized=self.moe_batch_prioritized_routing,
            eval_capacity_token_fraction=self.moe_eval_capacity_token_fraction,
            generation_capacity_token_fraction=self.moe_generation_capacity_token_fraction,
        )

    def problems(self, *, num_layers: int, world_size: int) -> list[str]:
        """One sentence per value that cannot be honoured, whatever the other flags of fairseq say."""
        found = self._range_problems(num_layers)
        if not self.enabled:
            return found
        minimum = self.top_k
        if self.moe_expert_count < minimum:
            found.append(
                f"--moe-expert-count is {self.moe_expert_count}, but top-{minimum} routing needs at least "
                f"{minimum} experts; raise it" + (" or pass --moe-top1-expert." if minimum == 2 else ".")
            )
        else:
            problem = layout_problem(num_experts=self.moe_expert_count, world_size=world_size)
            if problem is not None:
                found.append(problem)
        return found

    def _range_problems(self, num_layers: int) -> list[str]:
        found = []
        if self.moe_freq < 0 or self.moe_freq > num_layers:
            found.append(
                f"--moe-freq is {self.moe_freq}, expected 0 (no experts) to {num_layers} (the number of "
                "decoder layers)."
            )
        if self.moe_freq == 0 and self.moe_expert_count != 0:
            found.append(
                f"--moe-expert-count is {self.moe_expert_count} but --moe-freq is 0, so no layer would have "
                "experts; pass --moe-freq N to put them into every N-th layer."
            )
        policies = [policy.value for policy in SecondExpertPolicy]
        if self.moe_second_expert_policy not in policies:
            found.append(
                f"--moe-second-expert-policy is {self.moe_second_expert_policy!r}, expected one of "
                f"{', '.join(policies)}."
            )
        if self.moe_normalize_expert_grad not in _GRAD_DIVISORS:
            found.append(
                f"--moe-normalize-expert-grad is {self.moe_normalize_expert_grad!r}, expected one of "
                f"{', '.join(_GRAD_DIVISORS)}."
            )
        if self.moe_expert_ffn_dim is not None and self.moe_expert_ffn_dim <= 0:
            found.append(f"--moe-expert-ffn-dim is {self.moe_expert_ffn_dim}, expected a positive width.")
        if self.alternate_decoder_ffn_embed_dim < 0:
            found.append(
                f"--alternate-decoder-ffn-embed-dim is {self.alternate_decoder_ffn_embed_dim}, expected 0 or "
                "a width."
            )
        for flag, fraction in (
            ("--moe-eval-capacity-token-fraction", self.moe_eval_capacity_token_fraction),
            ("--moe-generation-capacity-token-fraction", self.moe_generation_capacity_token_fraction),
        ):
            if fraction is not None and (math.isnan(fraction) or fraction > 1):
                found.append(
                    f"{flag} is {fraction}, expected a share of the batch's tokens up to 1, or at most 0 for "
                    "the training rule."
                )
        return found


def moe_problems(cfg: Any, *, world_size: int) -> list[str]:
    """Everything that keeps a training configuration from running, one sentence each.

    Args:
        cfg: a whole fairseq configuration (groups ``model``, ``criterion``, ...).
        world_size: number of ranks that will take part.
    """
    model = getattr(cfg, "model", None)
    moe = MoEConfig.from_args(model if model is not None else {})
    num_layers = int(getattr(model, "decoder_layers", None) or 0)
    found = moe.problems(num_layers=num_layers, world_size=world_size)
    if getattr(model, "use_stable_embedding", False):
        found.append("--use-stable-embedding is not supported (it needs bitsandbytes); leave it out.")
    found += _criterion_problems(getattr(cfg, "criterion", None))
    if moe.enabled:
        found += stock_flag_problems(cfg)
    return found


def _criterion_problems(criterion: Any) -> list[str]:
    weight = getattr(criterion, "moe_gate_loss_wt", None)
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        return [f"--moe-gate-loss-wt is {weight}, expected a finite weight of at least 0."]
    return []
