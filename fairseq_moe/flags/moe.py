"""Declare the flags that the moe branch has, and say what all MoE flags mean together, as one typed record.

``MoEConfig`` holds the flags under their fairseq names (``moe_freq`` is ``--moe-freq``); what is refused is in
``moe_checks``.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

from fairseq_moe.flags.megatron import MegatronConfig, moe_layer_pattern
from fairseq_moe.flags.parallel import Axes, ParallelConfig, resolve_axes
from fairseq_moe.flags.records import Group, flag, given_fields, words
from fairseq_moe.modules import ScorerConfig, TopKConfig
from fairseq_moe.modules.kernels.fp8 import Fp8Mode
from fairseq_moe.modules.routing.bias import BiasConfig
from fairseq_moe.modules.routing.branch import SecondExpertPolicy
from fairseq_moe.modules.routing.router import BranchConfig
from fairseq_moe.modules.shards import SequencePart

__all__ = ["MoEConfig"]

_experts = functools.partial(flag, Group.EXPERTS)
_routing = functools.partial(flag, Group.ROUTING)
_logging = functools.partial(flag, Group.LOGGING)
_speed = functools.partial(flag, Group.SPEED)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Hold the model flags of ``transformer_lm`` that concern experts, and those of stock's that they depend on."""

    moe_freq: int = _experts(0, "every N-th decoder layer has experts; 0: none")
    moe_expert_count: int = _experts(0, "experts of each MoE layer, over all ranks")
    moe_expert_ffn_dim: int | None = _experts(
        None, "hidden width of an expert (default: --decoder-ffn-embed-dim)"
    )
    moe_top1_expert: bool = _routing(False, "one expert per token instead of two")
    moe_gating_use_fp32: bool = _routing(False, "router softmax and all that follows it in float32")
    moe_second_expert_policy: str = _routing(
        "sampling", "choice of the second expert while training: sampling, random or all"
    )
    moe_normalize_gate_prob_before_dropping: bool = _routing(
        False, "normalise the two weights before tokens are dropped"
    )
    moe_batch_prioritized_routing: bool = _routing(False, "the surest tokens choose first (two experts only)")
    moe_eval_capacity_token_fraction: float = _routing(
        0.25, "expert capacity in evaluation, as a share of the tokens; <= 0: the training rule"
    )
    moe_generation_capacity_token_fraction: float | None = _routing(
        None, "the same for incremental decoding (default: nothing is dropped)"
    )
    moe_normalize_expert_grad: str = _experts(
        "world_size",
        "divisor of expert gradients: world_size, or sqrt_world_size (only where parameters are sharded)",
    )
    use_moe_pad_mask: bool | None = _routing(
        None,
        "padding is routed nowhere, and with --num-experts it is in no loss, capacity or statistic; alone, "
        "or with true or false (default: true with --num-experts, false with --moe-freq)",
    )
    record_a2a_perf_stats: bool = _speed(
        False, "log the time of the expert exchange (synchronises the device)"
    )
    dummy_a2a: bool = _speed(False, "leave out the expert exchange, to measure its cost; results are wrong")
    alternate_decoder_ffn_embed_dim: int = _experts(
        0, "MoE positions hold dense networks of this width instead of experts"
    )
    moe_per_layer_logging: bool = _logging(False, "log losses, loads and statistics of every MoE layer")
    moe_layer_recompute: bool = _speed(False, "compute MoE layers again in the backward pass, to save memory")
    moe_recompute_modules: str | None = _speed(
        None, "the same for parts of MoE layers: moe (all), experts, shared_experts, or several"
    )
    moe_fp8: str | None = _speed(
        None, "multiply the experts in FP8: native (recent GPUs; large experts), or emulate (anywhere, slow)"
    )
    fused_attention: bool = _speed(
        False, "self-attention by torch's fused causal kernel; equal to stock's within rounding"
    )
    use_stable_embedding: bool = _speed(
        False, "refused: bitsandbytes embeddings are not supported", argparse_alias="--stable-emb"
    )
    moe_freeze_modules: str | None = _experts(
        None, "leave routers (with the expert bias), experts, or both as they are"
    )
    num_workers_valid: int | None = _speed(
        None, "data loading workers in validation (default: --num-workers)"
    )
    # Flags of stock's, which the ones above depend on.
    checkpoint_activations: bool = False
    decoder_layers: int = 0
    batch_size: int | None = None
    tokens_per_sample: int = 0
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @classmethod
    def from_args(cls, args: Any) -> "MoEConfig":
        """Read the fields that ``args`` (namespace, config, mapping) has; the others keep their defaults."""
        records = {"megatron": MegatronConfig.from_args(args), "parallel": ParallelConfig.from_args(args)}
        return cls(**{**given_fields(cls, args), **records})

    @property
    def enabled(self) -> bool:
        """Tell whether any layer has experts."""
        return (self.moe_freq > 0 or self.megatron.selected) and not self.is_pseudo_moe

    @property
    def axes(self) -> Axes:
        """Return over how many ranks experts and all else are spread."""
        return resolve_axes(self.parallel, self.megatron)

    @property
    def num_experts(self) -> int:
        """Return E, the experts of each MoE layer."""
        return self.megatron.num_experts or self.moe_expert_count

    @property
    def expert_dim(self) -> int | None:
        """Return F, the hidden width of an expert, if it is not that of the dense layers."""
        return self.megatron.moe_ffn_hidden_size or self.moe_expert_ffn_dim

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Return the weights of the auxiliary losses; the criterion's flag weighs the branch's balance loss."""
        return self.megatron.loss_coefficients() if self.megatron.selected else {}

    @property
    def fp8(self) -> Fp8Mode | None:
        """Return how the experts' products are computed in FP8; None: they are not."""
        return None if self.moe_fp8 is None else Fp8Mode(self.moe_fp8)

    @property
    def masks_padding(self) -> bool:
        """Whether padding is routed nowhere, and enters no loss, capacity or statistic."""
        return self.megatron.selected if self.use_moe_pad_mask is None else self.use_moe_pad_mask

    @property
    def is_pseudo_moe(self) -> bool:
        """Tell whether MoE positions hold dense networks of another width: the branch's equal-FLOPs control."""
        return self.moe_freq > 0 and self.alternate_decoder_ffn_embed_dim > 0

    @property
    def top_k(self) -> int:
        """Return K, the experts per token."""
        if self.megatron.selected:
            return self.megatron.top_k
        return 1 if self.moe_top1_expert else 2

    def is_moe_layer(self, index: int) -> bool:
        """Tell whether layer ``index`` (from 0) is an MoE position."""
        if self.megatron.selected:
            return moe_layer_pattern(self.megatron.moe_layer_freq or "1", self.decoder_layers)[index]
        return self.moe_freq > 0 and (index + 1) % self.moe_freq == 0

    def router_config(self) -> BranchConfig | TopKConfig:
        """Make the routing rule that these flags ask for."""
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
        """Count the tokens of a rank's largest training batch; --max-tokens by itself does not fix them."""
        if self.batch_size is None:
            return None
        length = self.tokens_per_sample + 1  # one more: --add-bos-token
        part = SequencePart(length=length, context=self.parallel.context, tensor=self.parallel.tensor)
        return self.batch_size * part.num_own

    def scorer_config(self) -> ScorerConfig:
        """Describe how router logits are computed."""
        return self.megatron.scorer_config()

    def bias_config(self) -> BiasConfig | None:
        """Describe how the expert bias follows the load; None: there is none."""
        return self.megatron.bias_config()

    @property
    def recompute_modules(self) -> frozenset[str]:
        """Name the parts (of ``modules.recompute.RECOMPUTABLE``) that the backward pass computes again."""
        named = frozenset(words(self.moe_recompute_modules or ""))
        return named | {"moe"} if self.moe_layer_recompute else named
