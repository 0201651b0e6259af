"""Every reason to refuse a training configuration because of our flags: one sentence each, all at once.

``moe_problems`` looks at a whole fairseq configuration, before data is read.
"""

import math
from typing import Any

from fairseq_moe.flags.blocks_checks import block_problems
from fairseq_moe.flags.freezing import freeze_problems
from fairseq_moe.flags.gate_loss import gate_loss_problems
from fairseq_moe.flags.megatron_aliases import argument_problems
from fairseq_moe.flags.megatron_checks import megatron_problems, unused_arguments
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel_checks import parallel_problems, spread_problems
from fairseq_moe.flags.profiling import profile_problems
from fairseq_moe.flags.records import Range, changed_fields, flag_name, getter, one_of, ranges
from fairseq_moe.flags.reliability import ReliabilityConfig
from fairseq_moe.flags.sharding import sharding_problems
from fairseq_moe.flags.stock import stock_flag_problems
from fairseq_moe.modules.kernels.fp8 import Fp8Mode, native_problem, width_problem
from fairseq_moe.modules.recompute import RECOMPUTABLE
from fairseq_moe.modules.routing.branch import SecondExpertPolicy

__all__ = ["expert_problems", "moe_problems"]

_CHOICES = {
    "moe_second_expert_policy": [policy.value for policy in SecondExpertPolicy],
    "moe_normalize_expert_grad": ["world_size", "sqrt_world_size"],
    "moe_fp8": [mode.value for mode in Fp8Mode],
}

_HALF_PRECISION = ("bf16", "memory_efficient_bf16", "fp16", "memory_efficient_fp16")

_SHARE: Range = (
    lambda fraction: not math.isnan(fraction) and fraction <= 1,
    "a share of the batch's tokens up to 1, or at most 0 for the training rule",
)
_RANGES: dict[str, Range] = {
    "moe_expert_ffn_dim": (lambda width: width > 0, "a positive width"),
    "alternate_decoder_ffn_embed_dim": (lambda width: width >= 0, "0 or a width"),
    "moe_eval_capacity_token_fraction": _SHARE,
    "moe_generation_capacity_token_fraction": _SHARE,
}

# Flags of the branch's gates, and Megatron's for the same.
_RIVALS = {
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


def moe_problems(cfg: Any, *, world_size: int) -> list[str]:
    """List everything that keeps a training configuration from running, one sentence each.

    Args:
        cfg: a whole fairseq configuration (groups ``model``, ``criterion``, ...).
        world_size: number of ranks that will take part.
    """
    model = getattr(cfg, "model", None)
    model = {} if model is None else model
    moe = MoEConfig.from_args(model)
    found = expert_problems(moe, num_layers=moe.decoder_layers, world_size=world_size)
    if moe.use_stable_embedding:
        found.append("--use-stable-embedding is not supported (it needs bitsandbytes); leave it out.")
    if moe.fused_attention and getattr(model, "decoder_xformers_att_config", None) is not None:
        found.append("--fused-attention and --decoder-xformers-att-config replace the same code; choose one.")
    found += gate_loss_problems(getattr(cfg, "criterion", None), megatron_routing=moe.megatron.selected)
    found += argument_problems(model)
    found += block_problems(model)
    found += freeze_problems(cfg, has_experts=moe.enabled)
    found += sharding_problems(cfg, has_experts=moe.enabled)
    found += _fp8_problems(moe, cfg)
    found += parallel_problems(cfg, moe)
    found += profile_problems(cfg, has_experts=moe.enabled, world_size=world_size)
    if moe.enabled:
        found += ReliabilityConfig.from_args(model).problems()
        found += stock_flag_problems(cfg)
    return found


def expert_problems(moe: MoEConfig, *, num_layers: int, world_size: int) -> list[str]:
    """List one sentence per flag about experts that cannot be honoured, whatever the other flags of fairseq say.

    Args:
        moe: the flags.
        num_layers: decoder layers.
        world_size: number of ranks that will take part.
    """
    found = _frequency_problems(moe, num_layers) + one_of(moe, _CHOICES) + ranges(moe, _RANGES)
    found += megatron_problems(moe.megatron, num_layers=num_layers)
    found += _conflicts(moe)
    found += _recompute_problems(moe)
    if not moe.enabled:
        return found + unused_arguments(moe.megatron)
    if not moe.megatron.selected and moe.moe_expert_count < moe.top_k:
        found.append(
            f"--moe-expert-count is {moe.moe_expert_count}, but top-{moe.top_k} routing needs at least "
            f"{moe.top_k} experts; raise it" + (" or pass --moe-top1-expert." if moe.top_k == 2 else ".")
        )
    elif moe.num_experts >= 1:
        found += spread_problems(moe, world_size=world_size)
    return found


def _fp8_problems(moe: MoEConfig, cfg: Any) -> list[str]:
    """List why products cannot be in FP8: nothing to multiply, no device for it, float32, or widths that do not fit."""
    if moe.moe_fp8 is None or moe.moe_fp8 not in _CHOICES["moe_fp8"]:
        return []
    if not moe.enabled:
        return ["--moe-fp8 is about experts, and no layer has any; leave it out."]
    if moe.fp8 is not Fp8Mode.NATIVE:
        return []
    model, common = getter(cfg.model), getter(cfg.common)
    found = ["--cpu keeps this run from the GPU" if common("cpu") else native_problem()]
    width = moe.expert_dim or model("decoder_ffn_embed_dim")
    parts = moe.axes.expert_tensor
    found.append(width_problem(model("decoder_embed_dim"), width // max(parts, 1)))
    if not any(common(name) for name in _HALF_PRECISION):
        flags = ", ".join(flag_name(name) for name in _HALF_PRECISION)
        found.append(f"parameters are float32, expected half precision (one of {flags})")
    return [
        f"--moe-fp8 native cannot be honoured: {problem}; leave it out, or use --moe-fp8 emulate to judge losses."
        for problem in found
        if problem is not None
    ]


def _frequency_problems(moe: MoEConfig, num_layers: int) -> list[str]:
    allowed: Range = (
        lambda freq: 0 <= freq <= num_layers,
        f"0 (no experts) to {num_layers} (the number of decoder layers)",
    )
    found = ranges(moe, {"moe_freq": allowed})
    if moe.moe_freq == 0 and moe.moe_expert_count != 0:
        found.append(
            f"--moe-expert-count is {moe.moe_expert_count} but --moe-freq is 0, so no layer would have "
            "experts; pass --moe-freq N to put them into every N-th layer."
        )
    return found


def _conflicts(moe: MoEConfig) -> list[str]:
    """List flags that say something else than Megatron's."""
    if moe.dummy_a2a and moe.megatron.dispatcher != "alltoall":
        return [
            "--dummy-a2a leaves out the exchange of the alltoall dispatcher; leave out the other dispatcher."
        ]
    if not moe.megatron.selected:
        return []
    changed = changed_fields(moe)
    return [
        f"{flag_name(name)} belongs to the moe branch's gates and --num-experts selects Megatron's routing; use "
        f"{rival} instead."
        for name, rival in _RIVALS.items()
        if name in changed
    ]


def _recompute_problems(moe: MoEConfig) -> list[str]:
    wanted = moe.recompute_modules
    if not wanted:
        return []
    if not wanted <= set(RECOMPUTABLE):
        return [
            f"--moe-recompute-modules is {moe.moe_recompute_modules!r}, expected one or several of "
            f"{', '.join(RECOMPUTABLE)}."
        ]
    flag = "--moe-recompute-modules" if moe.moe_recompute_modules else "--moe-layer-recompute"
    found = []
    if not moe.enabled:
        found.append(f"{flag} needs layers with experts; leave it out, or use --checkpoint-activations.")
    if moe.checkpoint_activations:
        found.append(
            f"--checkpoint-activations computes MoE layers again already, so {flag} would do it twice; "
            "choose one."
        )
    if "moe" in wanted and len(wanted) > 1:
        found.append(
            f"--moe-recompute-modules {' '.join(sorted(wanted))}: moe is the whole layer; leave out its parts."
        )
    if "shared_experts" in wanted and moe.megatron.moe_shared_expert_intermediate_size is None:
        found.append(
            "--moe-recompute-modules shared_experts needs --moe-shared-expert-intermediate-size; add it."
        )
    return found
