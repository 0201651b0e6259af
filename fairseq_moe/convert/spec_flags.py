"""Translate a model into flags of ``transformer_lm``, and flags into the model of some family."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, get_args, get_type_hints

from fairseq_moe.convert.hf.config_writer import fitting_family
from fairseq_moe.convert.hf.families import FAMILIES
from fairseq_moe.convert.spec import Mla, ModelSpec, Rope, Routing
from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.blocks_checks import block_problems
from fairseq_moe.flags.megatron import MegatronConfig
from fairseq_moe.flags.megatron_checks import megatron_problems
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu

__all__ = ["command_line", "flags_of", "spec_of"]

_YARN = {
    "factor": "rope_scaling_factor",
    "original_max_positions": "rope_original_max_positions",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "mscale": "rope_mscale",
    "mscale_all_dim": "rope_mscale_all_dim",
    "attention_factor": "rope_attention_factor",
}
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
_LOSSES = frozenset({"aux_loss", "seq_aux_loss", "global_aux_loss", "none"})


def flags_of(spec: ModelSpec) -> dict[str, Any]:
    """Translate a model into model flags, by field name; those left out have their defaults."""
    routing, mla, yarn = spec.routing, spec.mla, spec.rope.yarn
    found: dict[str, Any] = {
        "decoder_layers": spec.num_layers,
        "decoder_embed_dim": spec.model_dim,
        "decoder_input_dim": spec.model_dim,
        "decoder_output_dim": spec.model_dim,
        "decoder_ffn_embed_dim": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "decoder_attention_heads": spec.num_heads,
        "share_decoder_input_output_embed": spec.tied,
        "no_scale_embedding": True,
        "dropout": 0.0,
        "attention_dropout": spec.attention_dropout,
        "decoder_normalization": "rmsnorm",
        "norm_eps": spec.norm_eps,
        "position_embedding": "rope",
        "rope_theta": spec.rope.theta,
        "rope_interleaved": spec.rope.interleaved,
        "rotary_fraction": None if spec.rope.fraction == 1.0 else spec.rope.fraction,
        "attention_bias": spec.attention_bias,
        "gated_ffn": True,
        "mtp_layers": spec.mtp_layers,
        "init_std": spec.init_std,
        "num_experts": routing.num_experts,
        "moe_ffn_hidden_size": spec.expert_ffn_dim,
        "moe_layer_freq": _pattern(spec.moe_layers),
        "moe_router_topk": routing.top_k,
        "moe_router_score_function": routing.score,
        "moe_router_pre_softmax": routing.score == "softmax" and not routing.normalized,
        "moe_router_load_balancing_type": "seq_aux_loss" if routing.aux_loss_per_sequence else "aux_loss",
        "moe_aux_loss_coeff": repr(routing.aux_loss_coeff),
        "moe_router_enable_expert_bias": routing.expert_bias,
        "moe_router_num_groups": routing.num_groups,
        "moe_router_group_topk": routing.group_topk,
        "moe_router_group_score": routing.group_score,
        "moe_shared_expert_intermediate_size": spec.shared_ffn_dim,
        "moe_shared_expert_gate": spec.shared_gate,
        "clip_qkv": spec.clip_qkv,
        "attention_sinks": spec.sinks,
        "attention_window": spec.window,
        "attention_window_layers": None if spec.window is None else _pattern(spec.window_layers),
        "gated_ffn_bias": spec.ffn_bias,
        "swiglu_limit": spec.swiglu_limit,
        "swiglu_alpha": spec.swiglu_alpha,
        "moe_router_bias": routing.logits_bias,
        "attention_multiplier": spec.attention_multiplier,
    }
    found |= {name: value for name in _FACTORS if (value := getattr(spec, name)) != 1.0}
    if routing.scaling != 1.0:
        found["moe_router_topk_scaling_factor"] = routing.scaling
    if mla is None:
        found |= {
            "decoder_kv_heads": spec.num_kv_heads,
            "decoder_head_dim": spec.head_dim,
            "qk_norm": spec.qk_norm,
            "qk_norm_after_rope": spec.qk_norm_after_rope,
        }
    else:
        found |= {name: getattr(mla, name) for name in _MLA}
    if FAMILIES[spec.family].routes_in_float32:
        found["moe_router_dtype"] = "fp32"
    if yarn is not None:
        found["rope_scaling"] = "yarn"
        found |= {flag: getattr(yarn, name) for name, flag in _YARN.items()}
        found["rope_untruncated"] = not yarn.truncate
    return {name: value for name, value in found.items() if value is not None}


def _pattern(layers: tuple[bool, ...]) -> str:
    if all(layers):
        return "1"
    for period in range(2, len(layers) // 2 + 1):
        if layers == layers[:period] * (len(layers) // period):
            return f"({[int(marked) for marked in layers[:period]]}*{len(layers) // period})".replace(" ", "")
    runs = ((int(marked), len(list(run))) for marked, run in groupby(layers))
    return "(" + "+".join(f"[{is_moe}]*{length}" for is_moe, length in runs) + ")"


def command_line(spec: ModelSpec) -> list[str]:
    """Write the model flags for a shell, one flag a line."""
    lines = ["--arch transformer_lm"]
    for name, value in (flags_of(spec) | {"max_target_positions": spec.max_positions}).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            lines += [flag] if value else []
        else:
            lines.append(f"{flag} {value}")
    return lines


def spec_of(flags: Mapping[str, Any], *, vocab_size: int, max_positions: int) -> ModelSpec:
    """Find the model that flags describe, of the first family that has it.

    Args:
        flags: of a ``transformer_lm``, by field name.
        vocab_size: V.
        max_positions: longest sequence.

    Raises:
        ConfigError: there is no such model, or no family has it; says which flags stand in the way.
    """
    moe, blocks = MoEConfig.from_args(flags), BlocksConfig.from_args(flags)
    if not moe.megatron.selected or not blocks.enabled:
        raise ConfigError(
            [
                "Hugging Face's families have RMSNorm, rotary positions, SwiGLU and experts routed as in "
                "Megatron; this model was built without --num-experts, --gated-ffn and the flags beside it, so "
                "it cannot be written as one of them."
            ]
        )
    problems = _size_problems(flags) + _mistyped(moe, moe.megatron, blocks) or [
        *megatron_problems(moe.megatron, num_layers=moe.decoder_layers),
        *block_problems(flags),
    ]
    if problems:
        raise ConfigError(problems)
    stray = _refusals(flags, blocks, moe.megatron)
    if stray:
        raise ConfigError([f"no family of Hugging Face's has {', '.join(stray)}, as this model has."])
    spec = _described(flags, moe, blocks, vocab_size=vocab_size, max_positions=max_positions)
    return replace(spec, family=fitting_family(spec))


def _size_problems(flags: Mapping[str, Any]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} is {flags.get(name)!r}, expected a whole number from 1 up."
        for name in (
            "decoder_embed_dim",
            "decoder_ffn_embed_dim",
            "decoder_attention_heads",
            "decoder_layers",
        )
        if not isinstance(flags.get(name), int) or flags[name] < 1
    ]


def _mistyped(*records: Any) -> list[str]:
    """Say one sentence per value that no command line gives; a record of flags takes what a file says."""
    found = []
    for record in records:
        for name, kind in get_type_hints(type(record)).items():
            kind = kind | int if float in (kind, *get_args(kind)) else kind
            if not isinstance(value := getattr(record, name), kind):
                found.append(
                    f"--{name.replace('_', '-')} is {value!r}, which is of no type that it may have."
                )
    return found


def _described(
    flags: Mapping[str, Any], moe: MoEConfig, blocks: BlocksConfig, *, vocab_size: int, max_positions: int
) -> ModelSpec:
    megatron, heads = moe.megatron, flags["decoder_attention_heads"]
    dim, ffn_dim = flags["decoder_embed_dim"], flags["decoder_ffn_embed_dim"]
    moe_layers = tuple(moe.is_moe_layer(index) for index in range(moe.decoder_layers))
    mla = None
    if blocks.is_latent:
        mla = Mla(**{name: getattr(blocks, name) for name in _MLA})
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    else:
        head_dim = blocks.decoder_head_dim or dim // heads
    bias = blocks.attention_bias or ("none" if blocks.is_latent else "all")
    rotary = blocks.rotary_config()
    return ModelSpec(
        family="",
        vocab_size=vocab_size,
        model_dim=dim,
        num_layers=moe.decoder_layers,
        num_heads=heads,
        num_kv_heads=blocks.decoder_kv_heads or heads,
        head_dim=head_dim,
        attention_bias=bias,
        qk_norm=blocks.qk_norm or "none",
        qk_norm_after_rope=blocks.qk_norm_after_rope,
        clip_qkv=blocks.clip_qkv,
        sinks=blocks.attention_sinks,
        **_windows(blocks, moe.decoder_layers),
        mla=mla,
        rope=Rope(
            theta=1.0 if rotary is None else rotary.theta,
            interleaved=blocks.rope_interleaved,
            fraction=1.0 if rotary is None else rotary.fraction,
            yarn=None if rotary is None else rotary.yarn,
        ),
        **_factors(blocks, head_dim),
        norm_eps=blocks.eps,
        ffn_bias=blocks.gated_ffn_bias,
        **_clamp(blocks),
        dense_ffn_dim=None if all(moe_layers) else ffn_dim,
        expert_ffn_dim=moe.expert_dim or ffn_dim,
        shared_ffn_dim=megatron.moe_shared_expert_intermediate_size,
        shared_gate=megatron.moe_shared_expert_gate,
        moe_layers=moe_layers,
        routing=_routing(megatron),
        mtp_layers=blocks.mtp_layers,
        tied=bool(flags.get("share_decoder_input_output_embed")),
        max_positions=max_positions,
        init_std=blocks.std,
        attention_dropout=float(flags.get("attention_dropout") or 0.0),
    )


def _windows(blocks: BlocksConfig, num_layers: int) -> dict[str, Any]:
    if blocks.attention_window is None:
        return {}
    layers = tuple(window is not None for window in blocks.windows(num_layers))
    return {"window": blocks.attention_window, "window_layers": layers}


def _factors(blocks: BlocksConfig, head_dim: int) -> dict[str, Any]:
    found = {name: 1.0 if (value := getattr(blocks, name)) is None else value for name in _FACTORS}
    scale = blocks.attention_multiplier
    return found | {"attention_multiplier": None if scale == head_dim**-0.5 else scale}


def _clamp(blocks: BlocksConfig) -> dict[str, Any]:
    activation = blocks.gated_activation()
    if not isinstance(activation, ClampedSwiglu):
        return {}
    return {"swiglu_limit": activation.limit, "swiglu_alpha": activation.alpha}


def _routing(megatron: MegatronConfig) -> Routing:
    is_softmax = megatron.score_function == "softmax"
    coefficients = megatron.loss_coefficients()
    return Routing(
        num_experts=megatron.num_experts or 0,
        top_k=megatron.top_k,
        score=megatron.score_function,
        normalized=not (is_softmax and megatron.moe_router_pre_softmax),
        scaling=megatron.moe_router_topk_scaling_factor or 1.0,
        num_groups=megatron.moe_router_num_groups,
        group_topk=megatron.moe_router_group_topk,
        group_score=megatron.moe_router_group_score,
        expert_bias=megatron.moe_router_enable_expert_bias,
        logits_bias=megatron.moe_router_bias,
        aux_loss_coeff=coefficients.get("aux") or coefficients.get("seq_aux") or 0.0,
        aux_loss_per_sequence="seq_aux" in coefficients,
    )


def _refusals(flags: Mapping[str, Any], blocks: BlocksConfig, megatron: MegatronConfig) -> list[str]:
    """List flags that give a model which no family has."""
    score, groups = megatron.score_function, megatron.moe_router_num_groups
    checks = (
        (blocks.decoder_normalization != "rmsnorm", "norms other than --decoder-normalization rmsnorm"),
        (blocks.position_embedding != "rope", "positions other than --position-embedding rope"),
        (not blocks.gated_ffn, "networks without --gated-ffn"),
        (not flags.get("no_scale_embedding"), "embeddings without --no-scale-embedding"),
        (bool(flags.get("layernorm_embedding")), "--layernorm-embedding"),
        (bool(flags.get("no_decoder_final_norm")), "--no-decoder-final-norm"),
        (
            blocks.mtp_layers > 0 and score != "sigmoid",
            "--mtp-layers without --moe-router-score-function sigmoid",
        ),
        (megatron.use_xmoe, "--use-xmoe"),
        (megatron.has_capacity, "--moe-expert-capacity-factor"),
        (megatron.moe_router_force_load_balancing is not None, "--moe-router-force-load-balancing"),
        (score not in ("softmax", "sigmoid"), f"--moe-router-score-function {score}"),
        (groups is not None and megatron.moe_router_group_score is None, "--moe-router-group-score sum"),
        (
            not set(megatron.balancing_types) <= _LOSSES,
            f"--moe-router-load-balancing-type {' '.join(megatron.balancing_types)}",
        ),
    )
    return [text for is_bad, text in checks if is_bad]
