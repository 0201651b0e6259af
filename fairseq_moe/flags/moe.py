"""What the MoE flags mean, as one typed record, and every reason to refuse them.

``MoEConfig`` holds the flags under their fairseq names (``moe_freq`` is ``--moe-freq``). ``moe_problems``
looks at a whole fairseq configuration and returns one sentence per problem, all at once, before data is read.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from fairseq_moe.flags.blocks import block_problems
from fairseq_moe.flags.freezing import freeze_problems
from fairseq_moe.flags.megatron import MegatronConfig, moe_layer_pattern
from fairseq_moe.flags.megatron_aliases import argument_problems
from fairseq_moe.flags.megatron_checks import megatron_problems, unused_arguments
from fairseq_moe.flags.records import given_fields, words
from fairseq_moe.flags.reliability import ReliabilityConfig
from fairseq_moe.flags.stock import stock_flag_problems
from fairseq_moe.modules import ScorerConfig, TopKConfig
from fairseq_moe.modules.recompute import RECOMPUTABLE
from fairseq_moe.modules.routing.bias import BiasConfig
from fairseq_moe.modules.routing.branch import SecondExpertPolicy
from fairseq_moe.modules.routing.router import BranchConfig
from fairseq_moe.parallel.experts import layout_problem

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
    use_moe_pad_mask: bool | None = None
    record_a2a_perf_stats: bool = False
    dummy_a2a: bool = False
    alternate_decoder_ffn_embed_dim: int = 0
    moe_per_layer_logging: bool = False
    moe_layer_recompute: bool = False
    moe_recompute_modules: str | None = None
    fused_attention: bool = False
    checkpoint_activations: bool = False
    decoder_layers: int = 0
    batch_size: int | None = None
    tokens_per_sample: int = 0
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    @classmethod
    def from_args(cls, args: Any) -> "MoEConfig":
        """Read the fields that ``args`` (namespace, config, mapping) has; the others keep their defaults."""
        return cls(**{**given_fields(cls, args), "megatron": MegatronConfig.from_args(args)})

    @property
    def enabled(self) -> bool:
        """Whether any layer has experts."""
        return (self.moe_freq > 0 or self.megatron.selected) and not self.is_pseudo_moe

    @property
    def num_experts(self) -> int:
        """E, experts of each MoE layer."""
        return self.megatron.num_experts or self.moe_expert_count

    @property
    def expert_dim(self) -> int | None:
        """F, if it is not that of the dense layers."""
        return self.megatron.moe_ffn_hidden_size or self.moe_expert_ffn_dim

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Weights of the losses by the model's flags; the criterion's weighs the branch's balance loss."""
        return self.megatron.loss_coefficients() if self.megatron.selected else {}

    @property
    def masks_padding(self) -> bool:
        """Whether padding is routed nowhere, and enters no loss, capacity or statistic."""
        return self.megatron.selected if self.use_moe_pad_mask is None else self.use_moe_pad_mask

    @property
    def is_pseudo_moe(self) -> bool:
        """MoE positions hold dense networks of another width: the branch's equal-FLOPs control."""
        return self.moe_freq > 0 and self.alternate_decoder_ffn_embed_dim > 0

    @property
    def top_k(self) -> int:
        """Experts per token."""
        if self.megatron.selected:
            return self.megatron.top_k
        return 1 if self.moe_top1_expert else 2

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer ``index`` (from 0) is an MoE position."""
        if self.megatron.selected:
            return moe_layer_pattern(self.megatron.moe_layer_freq or "1", self.decoder_layers)[index]
        return self.moe_freq > 0 and (index + 1) % self.moe_freq == 0

    def router_config(self) -> BranchConfig | TopKConfig:
        """The routing rule these flags ask for."""
        if self.megatron.selected:
            return self.megatron.topk_config(max_tokens=self._max_tokens())
        return BranchConfig(
            top_k=self.top_k,
            gating_use_fp32=self.moe_gating_use_fp32,
            second_expert_policy=SecondExpertPolicy(self.moe_second_expert_policy),
            normalize_before_dropping=self.moe_normalize_gate_prob_before_dropping,
            batch_prioritized=self.moe_batch_prioritized_routing,
            eval_capacity_token_fraction=self.moe_eval_capacity_token_fraction,
            generation_capacity_token_fraction=self.moe_generation_capacity_token_fraction,
        )

    def _max_tokens(self) -> int | None:
        """Tokens of the largest training batch of a rank; --max-tokens by itself does not fix it."""
        if self.batch_size is None:
            return None
        return self.batch_size * (self.tokens_per_sample + 1)  # one more: --add-bos-token

    def scorer_config(self) -> ScorerConfig:
        """How router logits are computed."""
        return self.megatron.scorer_config()

    def bias_config(self) -> BiasConfig | None:
        """How the expert bias follows the load; None: there is none."""
        return self.megatron.bias_config()

    @property
    def recompute_modules(self) -> frozenset[str]:
        """Which of ``modules.recompute.RECOMPUTABLE`` are computed again in the backward pass."""
        named = frozenset(words(self.moe_recompute_modules or ""))
        return named | {"moe"} if self.moe_layer_recompute else named

    def problems(self, *, num_layers: int, world_size: int) -> list[str]:
        """One sentence per value that cannot be honoured, whatever the other flags of fairseq say."""
        found = self._range_problems(num_layers)
        found += megatron_problems(self.megatron, num_layers=num_layers)
        found += self._conflicts()
        found += self._recompute_problems()
        if not self.enabled:
            return found + unused_arguments(self.megatron)
        if not self.megatron.selected and self.moe_expert_count < self.top_k:
            found.append(
                f"--moe-expert-count is {self.moe_expert_count}, but top-{self.top_k} routing needs at least "
                f"{self.top_k} experts; raise it"
                + (" or pass --moe-top1-expert." if self.top_k == 2 else ".")
            )
        elif self.num_experts >= 1:
            problem = layout_problem(
                num_experts=self.num_experts,
                world_size=world_size,
                ep_size=self.megatron.expert_model_parallel_size,
            )
            found += [] if problem is None else [problem]
        return found

    def _conflicts(self) -> list[str]:
        """Flags that say something else than Megatron's."""
        if self.dummy_a2a and self.megatron.dispatcher != "alltoall":
            return [
                "--dummy-a2a leaves out the exchange of the alltoall dispatcher; leave out the other "
                "dispatcher."
            ]
        if not self.megatron.selected:
            return []
        default = MoEConfig()
        rivals = {
            "moe_expert_count": "--num-experts",
            "moe_freq": "--moe-layer-freq",
            "moe_expert_ffn_dim": "--moe-ffn-hidden-size",
            "moe_top1_expert": "--moe-router-topk 1",
            "moe_second_expert_policy": "--moe-router-topk",
            "moe_normalize_gate_prob_before_dropping": "--moe-router-pre-softmax",
            "moe_batch_prioritized_routing": "--moe-token-drop-policy prioritized",
            "moe_eval_capacity_token_fraction": "--moe-expert-capacity-factor",
            "moe_generation_capacity_token_fraction": "--moe-expert-capacity-factor",
            "alternate_decoder_ffn_embed_dim": "--decoder-ffn-embed-dim of a dense model",
        }
        return [
            f"--{name.replace('_', '-')} belongs to the moe branch's gates and --num-experts selects "
            f"Megatron's routing; use {rival} instead."
            for name, rival in rivals.items()
            if getattr(self, name) != getattr(default, name)
        ]

    def _recompute_problems(self) -> list[str]:
        wanted = self.recompute_modules
        if not wanted:
            return []
        unknown = sorted(wanted - set(RECOMPUTABLE))
        if unknown:
            return [
                f"--moe-recompute-modules is {self.moe_recompute_modules!r}, expected one or several of "
                f"{', '.join(RECOMPUTABLE)}."
            ]
        flag = "--moe-recompute-modules" if self.moe_recompute_modules else "--moe-layer-recompute"
        found = []
        if not self.enabled:
            found.append(f"{flag} needs layers with experts; leave it out, or use --checkpoint-activations.")
        if self.checkpoint_activations:
            found.append(
                f"--checkpoint-activations computes MoE layers again already, so {flag} would do it twice; "
                "choose one."
            )
        if "moe" in wanted and len(wanted) > 1:
            found.append(
                f"--moe-recompute-modules {' '.join(sorted(wanted))}: moe is the whole layer; leave out its "
                "parts."
            )
        if "shared_experts" in wanted and self.megatron.moe_shared_expert_intermediate_size is None:
            found.append(
                "--moe-recompute-modules shared_experts needs --moe-shared-expert-intermediate-size; add it."
            )
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
                f"--alternate-decoder-ffn-embed-dim is {self.alternate_decoder_ffn_embed_dim}, expected 0 "
                "or a width."
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
    if moe.fused_attention and getattr(model, "decoder_xformers_att_config", None) is not None:
        found.append("--fused-attention and --decoder-xformers-att-config replace the same code; choose one.")
    found += _criterion_problems(getattr(cfg, "criterion", None), moe)
    found += argument_problems(model if model is not None else {})
    found += block_problems(model if model is not None else {})
    found += freeze_problems(cfg, has_experts=moe.enabled)
    if moe.enabled:
        found += ReliabilityConfig.from_args(model).problems()
        found += stock_flag_problems(cfg)
    return found


def _criterion_problems(criterion: Any, moe: MoEConfig) -> list[str]:
    weight = getattr(criterion, "moe_gate_loss_wt", None)
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        return [f"--moe-gate-loss-wt is {weight}, expected a finite weight of at least 0."]
    if not moe.megatron.selected:
        return []
    defaults = {
        "moe_gate_loss_wt": 1.0,
        "moe_gate_loss_combine_method": "average",
        "moe_gate_loss_transform": "none",
    }
    return [
        f"--{name.replace('_', '-')} is about the moe branch's balance loss, which --num-experts does not "
        "have; use --moe-aux-loss-coeff instead."
        for name, default in defaults.items()
        if getattr(criterion, name, None) not in (None, default)
    ]
