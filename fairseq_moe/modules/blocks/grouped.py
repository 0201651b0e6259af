"""Self-attention whose query heads share key and value heads (Ainslie et al. 2023, arXiv 2305.13245).

With as many key heads as query heads it is the usual one.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_moe.modules.blocks.attend import Cache, attend, extended, forget, num_seen
from fairseq_moe.modules.blocks.norm import RMSNorm, normalize_over_tensor
from fairseq_moe.modules.blocks.over_context import attend_over_context
from fairseq_moe.modules.blocks.rope import Rotary
from fairseq_moe.modules.shards import LocalShards, Shards

__all__ = ["GroupedAttention", "GroupedAttentionConfig"]

_CACHED = {"key": 2, "value": 2, "padding": 1}  # along which dimension positions lie


@dataclass(frozen=True, kw_only=True)
class GroupedAttentionConfig:
    """Sizes and options of a ``GroupedAttention``.

    Args:
        model_dim: D, model width.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of the query heads.
        head_dim: size of each; heads times size need not be D.
        bias: which projections have one: ``none``, ``qkv`` (Qwen2) or ``all`` (with the output's).
        qk_norm: RMSNorm on queries and keys before they turn: ``none``, ``head`` (over each head, Qwen3) or
            ``full`` (over the whole projection, OLMoE).
        norm_after_rope: heads are normalised after they turn, not before (Hunyuan).
        norm_eps: of these norms.
        scale: multiplies the scores (Granite); None: one over the root of a head's size.
        clip: bound of the values of queries, keys and values (OLMoE); None: none.
        dropout: probability, on attention weights.
        padded_see_themselves: see ``attend``.
        sinks: each query head has one more score, learned, whose weight takes no value (gpt-oss).
        window: positions that a query sees, its own included; None: all earlier ones.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: str = "none"
    qk_norm: str = "none"
    norm_after_rope: bool = False
    norm_eps: float = 1e-6
    scale: float | None = None
    clip: float | None = None
    dropout: float = 0.0
    padded_see_themselves: bool = True
    sinks: bool = False
    window: int | None = None


class GroupedAttention(nn.Module):
    """Attends with query heads that share key and value heads.

    Args:
        config: its sizes and options.
        rotary: turns queries and keys; None: they carry no positions.
        shards: the ranks of a micro-batch, of which each has heads of its own; None: this one has all. It is built
            with all heads; whoever builds it cuts the projections.
    """

    def __init__(
        self, config: GroupedAttentionConfig, rotary: Rotary | None = None, shards: Shards | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.rotary = rotary
        self.shards = shards or LocalShards()
        model_dim, head_dim = config.model_dim, config.head_dim
        query_dim, key_dim = config.num_heads * head_dim, config.num_kv_heads * head_dim
        has_bias = config.bias in ("qkv", "all")
        self.q_proj = nn.Linear(model_dim, query_dim, bias=has_bias)
        self.k_proj = nn.Linear(model_dim, key_dim, bias=has_bias)
        self.v_proj = nn.Linear(model_dim, key_dim, bias=has_bias)
        self.out_proj = nn.Linear(query_dim, model_dim, bias=config.bias == "all")
        if config.qk_norm != "none":
            is_full = config.qk_norm == "full"
            self.q_norm = RMSNorm(query_dim if is_full else head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(key_dim if is_full else head_dim, eps=config.norm_eps)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None

    def forward(
        self,
        x_BSD: Tensor,
        *,
        causal: bool = True,
        padding_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend to earlier tokens and, unless causal, to later ones.

        Args:
            x_BSD: float, of this rank's own tokens.
            causal: no token sees later ones.
            padding_BT: bool, True = padding, over earlier and new tokens, on all ranks of a micro-batch.
            cache: keys and values of earlier tokens; those of ``x_BSD`` are added. In a window it keeps what later
                tokens can see, of padding as well, if that is there.

        Returns:
            float (B, S, D).
        """
        config, shards = self.config, self.shards
        x_BSD = shards.gather(x_BSD)
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if config.qk_norm == "full":
            q, k = normalize_over_tensor([self.q_norm, self.k_norm], [q, k], shards)
        if config.clip is not None:
            q, k, v = (value.clamp(-config.clip, config.clip) for value in (q, k, v))
        q, k, v = (value.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for value in (q, k, v))
        if config.qk_norm == "head" and not config.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            start = num_seen(cache, "key", dim=2)
            spans = shards.part_of(x_BSD.shape[1] * shards.context).spans if shards.context > 1 else None
            q, k = (self.rotary(value, start=start, spans=spans) for value in (q, k))
        if config.qk_norm == "head" and config.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        look = functools.partial(
            attend,
            scale=config.head_dim**-0.5 if config.scale is None else config.scale,
            causal=causal,
            padded_see_themselves=config.padded_see_themselves,
            dropout=config.dropout if self.training else 0.0,
            sinks_H=self.sinks,
            window=config.window,
        )
        if shards.context > 1:
            y_BSN = attend_over_context(
                look,
                q,
                (k, v),
                lambda *both: both,
                shards=shards,
                padding_BT=padding_BT,
                window=config.window,
            )
        else:
            k, v = extended(cache, "key", k, dim=2), extended(cache, "value", v, dim=2)
            y_BSN = look(q, k, v, padding_BT=padding_BT)
            if config.window is not None:
                forget(cache, num_kept=config.window - 1, dims=_CACHED)
        return shards.project_back(self.out_proj, y_BSN)
