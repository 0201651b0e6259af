"""Flags of the blocks of newer decoders; what they mean together is in ``fairseq_moe.flags.blocks``."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass

__all__ = ["BlocksFlags"]


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BlocksFlags(FairseqDataclass):
    """Any of them builds the decoder from our own blocks; a block whose flag is not given is stock's."""

    decoder_normalization: Optional[str] = _flag(None, "layernorm (default) or rmsnorm")
    norm_eps: Optional[float] = _flag(None, "added to the mean square in norms (default: 1e-5)")
    position_embedding: Optional[str] = _flag(
        None, "rope (heads turn with their position) or none, in place of absolute positions"
    )
    rope_theta: Optional[float] = _flag(None, "base of the rotary frequencies (default: 10000)")
    rope_interleaved: bool = _flag(False, "neighbouring values turn as a pair, as in DeepSeek's models")
    rotary_fraction: Optional[float] = _flag(None, "share of each head that turns (default: 1)")
    rope_scaling: Optional[str] = _flag(None, "yarn: stretch rotary positions beyond the original context")
    rope_scaling_factor: Optional[float] = _flag(None, "yarn: new context length over the original one")
    rope_original_max_positions: Optional[int] = _flag(None, "yarn: tokens of the original context")
    rope_beta_fast: Optional[float] = _flag(None, "yarn: pairs that turn more often are kept (default: 32)")
    rope_beta_slow: Optional[float] = _flag(
        None, "yarn: pairs that turn less often are slowed down fully (default: 1)"
    )
    rope_mscale: Optional[float] = _flag(None, "yarn: weight of the logarithm that scales cosines and sines")
    rope_mscale_all_dim: Optional[float] = _flag(None, "yarn: the same for the scores of latent attention")
    rope_attention_factor: Optional[float] = _flag(
        None, "yarn: factor of cosines and sines (default: follows from the others)"
    )
    decoder_kv_heads: Optional[int] = _flag(
        None, "key and value heads, shared by groups of query heads (default: --decoder-attention-heads)"
    )
    decoder_head_dim: Optional[int] = _flag(
        None, "size of a head (default: --decoder-embed-dim / --decoder-attention-heads)"
    )
    attention_bias: Optional[str] = _flag(
        None, "which projections have a bias: none, qkv, or all (default; latent attention: none)"
    )
    qk_norm: Optional[str] = _flag(
        None, "normalise queries and keys: none (default), head (each head) or full (the whole projection)"
    )
    clip_qkv: Optional[float] = _flag(None, "bound of the values of queries, keys and values")
    kv_lora_rank: Optional[int] = _flag(
        None, "latent attention: size of the vector that keys and values are made from"
    )
    q_lora_rank: Optional[int] = _flag(None, "latent attention: the same for queries (default: none)")
    qk_nope_head_dim: Optional[int] = _flag(None, "latent attention: size of a head's part without positions")
    qk_rope_head_dim: Optional[int] = _flag(None, "latent attention: size of a head's part with positions")
    v_head_dim: Optional[int] = _flag(None, "latent attention: size of a head's values")
    gated_ffn: bool = _flag(
        False,
        "SwiGLU networks without biases, dense and expert ones; their activation is SiLU, not --activation-fn",
    )
    mtp_layers: int = _flag(0, "blocks that predict further tokens (multi-token prediction)")
    mtp_loss_weight: float = _flag(
        0.0, "weight of their mean loss in training; 0: they are kept as they are and not computed"
    )
    init_std: Optional[float] = _flag(
        None, "deviation of normal initial weights, with any of these flags (default: 0.02)"
    )
