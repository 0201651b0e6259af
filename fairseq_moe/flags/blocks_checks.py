"""Refuse flags of the blocks that cannot be honoured, together or beside stock's: one sentence each."""

from collections.abc import Mapping
from typing import Any

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.records import (
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    changed_fields,
    flag_name,
    getter,
    one_of,
    ranges,
)

__all__ = ["block_problems", "replaced_block_problems"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "decoder_normalization": ("layernorm", "rmsnorm"),
    "position_embedding": ("rope", "none"),
    "rope_scaling": ("yarn",),
    "attention_bias": ("none", "qkv", "all"),
    "qk_norm": ("none", "head", "full"),
}

_RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "norm_eps", "rope_theta", "rope_scaling_factor", "rope_original_max_positions", "rope_beta_fast",
            "rope_beta_slow", "rope_attention_factor", "attention_window", "decoder_kv_heads", "decoder_head_dim",
            "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "init_std",
            "clip_qkv", "swiglu_limit", "swiglu_alpha", "embedding_multiplier", "residual_multiplier",
            "attention_multiplier", "logits_scaling",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(("rope_mscale", "rope_mscale_all_dim", "mtp_layers", "mtp_loss_weight"), NOT_NEGATIVE),
    "rotary_fraction": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
}  # fmt: skip

_YARN_FLAGS = {
    "rope_scaling_factor", "rope_original_max_positions", "rope_beta_fast", "rope_beta_slow", "rope_mscale",
    "rope_mscale_all_dim", "rope_attention_factor", "rope_untruncated",
}  # fmt: skip

# Stock's flags that change blocks which are not there, and their values that mean "not given".
_STOCK_BLOCKS: Mapping[str, tuple[Any, ...]] = {
    "adaptive_input": (None, False),
    "adaptive_softmax_cutoff": (None,),
    "alternate_decoder_ffn_embed_dim": (None, 0),
    "base_layers": (None, 0),
    "character_embeddings": (None, False),
    "decoder_xformers_att_config": (None,),
    "quant_noise_pq": (None, 0),
    "quant_noise_scalar": (None, 0),
    "scale_attn": (None, False),
    "scale_fc": (None, False),
    "scale_heads": (None, False),
    "scale_resids": (None, False),
}


def block_problems(model: Any) -> list[str]:
    """List one sentence per flag of a model that its blocks cannot honour.

    Args:
        model: the model's flags (a namespace, config or mapping).
    """
    config = BlocksConfig.from_args(model)
    if not config.enabled:
        return []
    get = getter(model)
    found = _own_problems(
        config,
        model_dim=int(get("decoder_embed_dim") or 0),
        num_heads=int(get("decoder_attention_heads") or 1),
    )
    found += _window_problems(config, int(get("decoder_layers") or 0))
    given = flag_name(changed_fields(config)[0])
    found += replaced_block_problems(model, given)
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if get(name) not in (None, get("decoder_embed_dim")):
            found.append(
                f"{flag_name(name)} is {get(name)}, expected --decoder-embed-dim {get('decoder_embed_dim')} with "
                f"{given}."
            )
    return found


def replaced_block_problems(model: Any, given: str) -> list[str]:
    """List one sentence per flag of stock's that changes blocks which are not there, because ours take their place.

    Args:
        model: the model's flags (a namespace, config or mapping).
        given: the flag that asks for ours, as typed.
    """
    get = getter(model)
    return [
        f"{flag_name(name)} changes stock's blocks, which {given} replaces; leave one out."
        for name, absent in _STOCK_BLOCKS.items()
        if get(name) not in absent
    ]


def _own_problems(config: BlocksConfig, *, model_dim: int, num_heads: int) -> list[str]:
    found = one_of(config, _CHOICES) + ranges(config, _RANGES)
    if found:
        return found
    found = _rotary_problems(config) + _latent_problems(config) + _gated_problems(config)
    if not config.is_latent and not found:
        found += _head_problems(config, model_dim, num_heads)
    if config.mtp_loss_weight and not config.mtp_layers:
        found.append("--mtp-loss-weight needs --mtp-layers; add it.")
    return found


def _rotary_problems(config: BlocksConfig) -> list[str]:
    found = []
    given = [name for name in changed_fields(config) if name.startswith(("rope_", "rotary_"))]
    if config.position_embedding != "rope" and given:
        found.append(f"{_listed(given)} need --position-embedding rope; add it.")
    yarn = [name for name in given if name in _YARN_FLAGS]
    if config.rope_scaling is None and yarn:
        found.append(f"{_listed(yarn)} need --rope-scaling yarn; add it.")
    missing = config.rope_scaling_factor is None or config.rope_original_max_positions is None
    if config.qk_norm_after_rope and (config.qk_norm != "head" or config.position_embedding != "rope"):
        found.append("--qk-norm-after-rope needs --qk-norm head and --position-embedding rope; add them.")
    if config.rope_scaling is not None and missing:
        found.append(
            "--rope-scaling yarn needs --rope-scaling-factor and --rope-original-max-positions; add them."
        )
    return found


def _latent_problems(config: BlocksConfig) -> list[str]:
    sizes = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if not config.is_latent:
        stray = [name for name in ("q_lora_rank", *sizes) if getattr(config, name) is not None]
        return [f"{_listed(stray)} describe latent attention; give --kv-lora-rank."] if stray else []
    found = []
    missing = [name for name in sizes if getattr(config, name) is None]
    if missing:
        found.append(f"--kv-lora-rank needs {_listed(missing)}; add them.")
    rivals = (
        "decoder_kv_heads", "decoder_head_dim", "qk_norm", "clip_qkv", "rotary_fraction", "attention_sinks",
        "attention_window", "attention_multiplier",
    )  # fmt: skip
    given = [name for name in changed_fields(config) if name in rivals]
    if given:
        found.append(f"--kv-lora-rank asks for latent attention, which has no {_listed(given)}.")
    if config.attention_bias == "qkv":
        found.append("--attention-bias qkv does not describe latent attention; choose none or all.")
    if config.position_embedding != "rope":
        found.append("--kv-lora-rank needs --position-embedding rope; add it.")
    if not missing and config.qk_rope_head_dim is not None and config.qk_rope_head_dim % 2:
        found.append(f"--qk-rope-head-dim is {config.qk_rope_head_dim}, expected an even number.")
    return found


def _window_problems(config: BlocksConfig, num_layers: int) -> list[str]:
    if config.attention_window is None:
        stray = config.attention_window_layers is not None
        return ["--attention-window-layers needs --attention-window; add it."] if stray else []
    found = []
    if config.mtp_layers:
        found.append(
            "--attention-window does not say what the blocks of --mtp-layers see, which are no decoder layers; leave "
            "one out."
        )
    try:
        windows = config.windows(num_layers)
    except ValueError as error:
        return [*found, str(error)]
    if all(window is None for window in windows):
        found.append(
            f"--attention-window-layers {config.attention_window_layers} gives no layer the window; mark at least one."
        )
    return found


def _gated_problems(config: BlocksConfig) -> list[str]:
    found = []
    given = [name for name in ("gated_ffn_bias", "swiglu_limit") if getattr(config, name)]
    if given and not config.gated_ffn:
        found.append(f"{_listed(given)} describe SwiGLU networks; give --gated-ffn.")
    if config.swiglu_alpha is not None and config.swiglu_limit is None:
        found.append("--swiglu-alpha needs --swiglu-limit; add it.")
    return found


def _head_problems(config: BlocksConfig, model_dim: int, num_heads: int) -> list[str]:
    found = []
    if config.decoder_head_dim is None and model_dim % num_heads:
        found.append(
            f"--decoder-embed-dim {model_dim} is not a multiple of --decoder-attention-heads {num_heads}; "
            "give --decoder-head-dim."
        )
    if num_heads % (config.decoder_kv_heads or 1):
        found.append(
            f"--decoder-kv-heads is {config.decoder_kv_heads}, expected a divisor of the {num_heads} heads "
            "(--decoder-attention-heads)."
        )
    turning = int(config.head_dim(model_dim, num_heads) * (config.rotary_fraction or 1.0))
    if config.position_embedding == "rope" and (turning % 2 or not turning):
        found.append(f"rotary positions turn pairs, and {turning} values of each head turn; make that even.")
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(flag_name(name) for name in names)
