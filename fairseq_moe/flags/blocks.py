"""Declare the flags of newer decoders' blocks (norms, rotary positions, attention, SwiGLU), and say what they mean.

Any of these flags builds the decoder from our own blocks instead of stock's layers. A block whose flag is not
given is stock's: LayerNorm, attention with biases and as many key heads as query heads, a network of two matrices
with biases. Layers normalise before each block, as every stock language model does.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairseq_moe.flags.layer_pattern import layer_pattern
from fairseq_moe.flags.records import Group, flag, given_fields
from fairseq_moe.modules.blocks.grouped import GroupedAttentionConfig
from fairseq_moe.modules.blocks.latent import LatentAttentionConfig
from fairseq_moe.modules.blocks.rope import RotaryConfig, YarnConfig
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu, swiglu

__all__ = ["BlocksConfig"]

_DEFAULT_INIT_STD = 0.02
_DEFAULT_EPS = 1e-5
_DEFAULT_THETA = 10_000.0
_DEFAULT_ALPHA = 1.702  # of gpt-oss

_flag = functools.partial(flag, Group.BLOCKS)


@dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """Hold the flags of the blocks; None means that one was not given."""

    decoder_normalization: str | None = _flag(None, "layernorm (default) or rmsnorm")
    norm_eps: float | None = _flag(None, "added to the mean square in norms (default: 1e-5)")
    position_embedding: str | None = _flag(
        None, "rope (heads turn with their position) or none, in place of absolute positions"
    )
    rope_theta: float | None = _flag(None, "base of the rotary frequencies (default: 10000)")
    rope_interleaved: bool = _flag(False, "neighbouring values turn as a pair, as in DeepSeek's models")
    rotary_fraction: float | None = _flag(None, "share of each head that turns (default: 1)")
    rope_scaling: str | None = _flag(None, "yarn: stretch rotary positions beyond the original context")
    rope_scaling_factor: float | None = _flag(None, "yarn: new context length over the original one")
    rope_original_max_positions: int | None = _flag(None, "yarn: tokens of the original context")
    rope_beta_fast: float | None = _flag(None, "yarn: pairs that turn more often are kept (default: 32)")
    rope_beta_slow: float | None = _flag(
        None, "yarn: pairs that turn less often are slowed down fully (default: 1)"
    )
    rope_mscale: float | None = _flag(None, "yarn: weight of the logarithm that scales cosines and sines")
    rope_mscale_all_dim: float | None = _flag(None, "yarn: the same for the scores of latent attention")
    rope_attention_factor: float | None = _flag(
        None, "yarn: factor of cosines and sines (default: follows from the others)"
    )
    rope_untruncated: bool = _flag(
        False, "yarn: the bounds between kept and slowed pairs are not rounded to whole pairs"
    )
    decoder_kv_heads: int | None = _flag(
        None, "key and value heads, shared by groups of query heads (default: --decoder-attention-heads)"
    )
    decoder_head_dim: int | None = _flag(
        None, "size of a head (default: --decoder-embed-dim / --decoder-attention-heads)"
    )
    attention_bias: str | None = _flag(
        None, "which projections have a bias: none, qkv, or all (default; latent attention: none)"
    )
    qk_norm: str | None = _flag(
        None, "normalise queries and keys: none (default), head (each head) or full (the whole projection)"
    )
    qk_norm_after_rope: bool = _flag(
        False, "with --qk-norm head: heads are normalised after they turn, as in Hunyuan's models"
    )
    clip_qkv: float | None = _flag(None, "bound of the values of queries, keys and values")
    attention_sinks: bool = _flag(
        False, "each query head has one more score, learned, that joins the softmax and takes no value"
    )
    attention_window: int | None = _flag(
        None, "tokens that a query sees, itself included (default: all earlier ones)"
    )
    attention_window_layers: str | None = _flag(
        None, "which layers have the window: N, or zeros and ones such as ([1,0]*12) (default: all)"
    )
    kv_lora_rank: int | None = _flag(
        None, "latent attention: size of the vector that keys and values are made from"
    )
    q_lora_rank: int | None = _flag(None, "latent attention: the same for queries (default: none)")
    qk_nope_head_dim: int | None = _flag(None, "latent attention: size of a head's part without positions")
    qk_rope_head_dim: int | None = _flag(None, "latent attention: size of a head's part with positions")
    v_head_dim: int | None = _flag(None, "latent attention: size of a head's values")
    gated_ffn: bool = _flag(
        False,
        "SwiGLU networks, dense and expert ones, without biases; their activation is SiLU, not --activation-fn",
    )
    gated_ffn_bias: bool = _flag(False, "SwiGLU networks have biases, dense, shared and expert ones")
    swiglu_limit: float | None = _flag(
        None,
        "clamped SwiGLU, (u + 1) g sigmoid(alpha g): the bound of g, the gate's values, from above, and of u, those "
        "that it opens, on both sides (gpt-oss: 7)",
    )
    swiglu_alpha: float | None = _flag(None, "clamped SwiGLU: alpha (default: 1.702)")
    embedding_multiplier: float | None = _flag(None, "multiplies embeddings, as in Granite's models")
    residual_multiplier: float | None = _flag(
        None, "multiplies what attention and networks or experts add, as in Granite's models"
    )
    attention_multiplier: float | None = _flag(
        None, "multiplies the scores of attention (default: one over the root of a head's size)"
    )
    logits_scaling: float | None = _flag(None, "divides the logits, as in Granite's models")
    mtp_layers: int = _flag(0, "blocks that predict further tokens (multi-token prediction)")
    mtp_loss_weight: float = _flag(
        0.0, "weight of their mean loss in training; 0: they are kept as they are and not computed"
    )
    init_std: float | None = _flag(
        None, "deviation of normal initial weights, with any of these flags (default: 0.02)"
    )

    @classmethod
    def from_args(cls, args: Any) -> "BlocksConfig":
        """Read the fields that ``args`` (a namespace, config or mapping) has."""
        return cls(**given_fields(cls, args))

    @property
    def enabled(self) -> bool:
        """Tell whether the decoder is built from these blocks."""
        return self != BlocksConfig()

    @property
    def is_latent(self) -> bool:
        """Tell whether attention is latent (MLA)."""
        return self.kv_lora_rank is not None

    @property
    def eps(self) -> float:
        """Return what norms add to the mean square; those of latent attention have DeepSeek's constant."""
        return _DEFAULT_EPS if self.norm_eps is None else self.norm_eps

    @property
    def std(self) -> float:
        """Return the standard deviation of initial weights."""
        return _DEFAULT_INIT_STD if self.init_std is None else self.init_std

    def gated_activation(self) -> Callable[[Tensor], Tensor]:
        """Return the activation of SwiGLU networks, plain or clamped."""
        if self.swiglu_limit is None:
            return swiglu
        alpha = _DEFAULT_ALPHA if self.swiglu_alpha is None else self.swiglu_alpha
        return ClampedSwiglu(alpha=alpha, limit=self.swiglu_limit)

    def rotary_config(self) -> RotaryConfig | None:
        """Describe how heads turn with their position; None: they do not."""
        if self.position_embedding != "rope":
            return None
        return RotaryConfig(
            theta=_DEFAULT_THETA if self.rope_theta is None else self.rope_theta,
            interleaved=self.rope_interleaved,
            fraction=1.0 if self.rotary_fraction is None else self.rotary_fraction,
            yarn=self._yarn(),
        )

    def _yarn(self) -> YarnConfig | None:
        if self.rope_scaling is None:
            return None
        assert self.rope_scaling_factor is not None and self.rope_original_max_positions is not None
        return YarnConfig(
            factor=self.rope_scaling_factor,
            original_max_positions=self.rope_original_max_positions,
            beta_fast=YarnConfig.beta_fast if self.rope_beta_fast is None else self.rope_beta_fast,
            beta_slow=YarnConfig.beta_slow if self.rope_beta_slow is None else self.rope_beta_slow,
            mscale=self.rope_mscale,
            mscale_all_dim=self.rope_mscale_all_dim,
            attention_factor=self.rope_attention_factor,
            truncate=not self.rope_untruncated,
        )

    def rotary_head_dim(self, *, model_dim: int, num_heads: int) -> int:
        """Return the size of the vectors that turn: a head, or the part of it with positions."""
        return self.qk_rope_head_dim or self.head_dim(model_dim, num_heads)

    def head_dim(self, model_dim: int, num_heads: int) -> int:
        """Return the size of a head of grouped attention."""
        return self.decoder_head_dim or model_dim // num_heads

    def windows(self, num_layers: int) -> list[int | None]:
        """List the window of each decoder layer; None: it sees all earlier tokens.

        Raises:
            ValueError: a sentence that refuses --attention-window-layers.
        """
        if self.attention_window is None:
            return [None] * num_layers
        marks = layer_pattern(self.attention_window_layers or "1", num_layers, "attention_window_layers")
        return [self.attention_window if mark else None for mark in marks]

    def attention_config(
        self, *, model_dim: int, num_heads: int, dropout: float, window: int | None
    ) -> GroupedAttentionConfig | LatentAttentionConfig:
        """Describe the attention of a layer with this window, grouped or latent."""
        if self.kv_lora_rank is None:
            return GroupedAttentionConfig(
                model_dim=model_dim,
                num_heads=num_heads,
                num_kv_heads=self.decoder_kv_heads or num_heads,
                head_dim=self.head_dim(model_dim, num_heads),
                bias=self.attention_bias or "all",
                qk_norm=self.qk_norm or "none",
                norm_after_rope=self.qk_norm_after_rope,
                norm_eps=self.eps,
                scale=self.attention_multiplier,
                clip=self.clip_qkv,
                dropout=dropout,
                sinks=self.attention_sinks,
                window=window,
            )
        assert self.qk_nope_head_dim and self.qk_rope_head_dim and self.v_head_dim
        return LatentAttentionConfig(
            model_dim=model_dim,
            num_heads=num_heads,
            kv_rank=self.kv_lora_rank,
            q_rank=self.q_lora_rank,
            nope_dim=self.qk_nope_head_dim,
            rope_dim=self.qk_rope_head_dim,
            value_dim=self.v_head_dim,
            bias=self.attention_bias == "all",
            dropout=dropout,
        )
