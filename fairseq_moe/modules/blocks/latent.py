"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are linear in one small vector per token, the latent c; positions enter through one
more key k_r that all heads share. Incremental decoding keeps only c and k_r, and a single new token looks at them
directly: its queries and the sums of latents pass the heads' matrices instead of every earlier token.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_moe.modules.blocks.attend import Cache, attend, extended, num_seen
from fairseq_moe.modules.blocks.norm import RMSNorm
from fairseq_moe.modules.blocks.over_context import attend_over_context
from fairseq_moe.modules.blocks.rope import Rotary
from fairseq_moe.modules.shards import LocalShards, Shards

__all__ = ["LatentAttention", "LatentAttentionConfig"]

_LATENT_EPS = 1e-6  # DeepSeek's, whatever the model's other norms have


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Sizes and options of a ``LatentAttention``.

    Args:
        model_dim: D, model width.
        num_heads: heads.
        kv_rank: size of the latent c.
        q_rank: size of the queries' own latent; None: queries are linear in x.
        nope_dim: size of each head's part without positions.
        rope_dim: size of its part with positions.
        value_dim: size of each head's values.
        bias: the projections from x and to the output have one.
        dropout: probability, on attention weights.
    """

    model_dim: int
    num_heads: int
    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False
    dropout: float = 0.0


class LatentAttention(nn.Module):
    """Attends with keys and values that are linear in one latent vector per token.

    Args:
        config: its sizes and options.
        rotary: turns the parts with positions.
        shards: see ``GroupedAttention``. Latents are projected from a rank's own tokens, and gathered in place of x.
    """

    def __init__(self, config: LatentAttentionConfig, rotary: Rotary, shards: Shards | None = None) -> None:
        super().__init__()
        self.config = config
        self.rotary = rotary
        self.shards = shards or LocalShards()
        model_dim, num_heads, bias = config.model_dim, config.num_heads, config.bias
        query_dim = num_heads * (config.nope_dim + config.rope_dim)
        if config.q_rank is None:
            self.q_proj = nn.Linear(model_dim, query_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(model_dim, config.q_rank, bias=bias)
            self.q_a_norm = RMSNorm(config.q_rank, eps=_LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_rank, query_dim, bias=False)
        self.kv_a_proj = nn.Linear(model_dim, config.kv_rank + config.rope_dim, bias=bias)
        self.kv_a_norm = RMSNorm(config.kv_rank, eps=_LATENT_EPS)
        self.kv_b_proj = nn.Linear(
            config.kv_rank, num_heads * (config.nope_dim + config.value_dim), bias=False
        )
        self.out_proj = nn.Linear(num_heads * config.value_dim, model_dim, bias=bias)
        yarn = rotary.config.yarn
        self.scale = (config.nope_dim + config.rope_dim) ** -0.5 * (
            1.0 if yarn is None else yarn.score_scale()
        )

    def forward(
        self,
        x_BSD: Tensor,
        *,
        causal: bool = True,
        padding_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend, with the arguments of ``GroupedAttention.forward``; the cache keeps ``latent`` and ``rope_key``."""
        config, shards, num_new = self.config, self.shards, x_BSD.shape[1]
        start = num_seen(cache, "latent", dim=1)
        q_nope, q_rope = self._by_head(self._queries(x_BSD), config.nope_dim, config.rope_dim)
        c_BSr, rope_key_BSt = self.kv_a_proj(x_BSD).split([config.kv_rank, config.rope_dim], dim=-1)
        c_BSr, rope_key_BSt = shards.gather(self.kv_a_norm(c_BSr)), shards.gather(rope_key_BSt)
        spans = shards.part_of(c_BSr.shape[1] * shards.context).spans if shards.context > 1 else None
        q_rope, rope_key_BSt = (
            self.rotary(value, start=start, spans=spans) for value in (q_rope, rope_key_BSt)
        )
        look = functools.partial(
            attend, scale=self.scale, causal=causal, dropout=config.dropout if self.training else 0.0
        )
        if shards.context > 1:
            q, sources = torch.cat([q_nope, q_rope], dim=-1), (c_BSr, rope_key_BSt)
            y_BSN = attend_over_context(
                look, q, sources, self._keys_and_values, shards=shards, padding_BT=padding_BT
            )
            return shards.project_back(self.out_proj, y_BSN)
        c_BTr = extended(cache, "latent", c_BSr, dim=1)
        rope_key_BTt = extended(cache, "rope_key", rope_key_BSt, dim=1)
        through = self._look_at_latents if cache is not None and num_new == 1 else self._look_at_heads
        look = functools.partial(look, padding_BT=padding_BT)
        return shards.project_back(self.out_proj, through(look, q_nope, q_rope, c_BTr, rope_key_BTt))

    def _look_at_heads(
        self, look: Callable[..., Tensor], q_nope: Tensor, q_rope: Tensor, c_BTr: Tensor, rope_key_BTt: Tensor
    ) -> Tensor:
        """Attend by making keys and values of every head from every latent: (B, S, heads * value_dim)."""
        return look(torch.cat([q_nope, q_rope], dim=-1), *self._keys_and_values(c_BTr, rope_key_BTt))

    def _keys_and_values(self, c_BTr: Tensor, rope_key_BTt: Tensor) -> tuple[Tensor, Tensor]:
        """Make the keys and values of every head of this rank from latents."""
        k_nope, v = self._by_head(self.kv_b_proj(c_BTr), self.config.nope_dim, self.config.value_dim)
        shared_key = rope_key_BTt.unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)
        return torch.cat([k_nope, shared_key], dim=-1), v

    def _look_at_latents(
        self, look: Callable[..., Tensor], q_nope: Tensor, q_rope: Tensor, c_BTr: Tensor, rope_key_BTt: Tensor
    ) -> Tensor:
        """Attend to the latents: q . (Wk c) = (q Wk) . c and sum(a Wv c) = Wv sum(a c), one key head for all."""
        config = self.config
        by_head = self.kv_b_proj.weight.unflatten(0, (config.num_heads, -1))
        key_matrix_Hpr, value_matrix_Her = by_head.split([config.nope_dim, config.value_dim], dim=1)
        latents_BSN = look(
            torch.cat([q_nope @ key_matrix_Hpr, q_rope], dim=-1),
            torch.cat([c_BTr, rope_key_BTt], dim=-1).unsqueeze(1),
            c_BTr.unsqueeze(1),
        )
        latents_BHSr = latents_BSN.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        return (latents_BHSr @ value_matrix_Her.mT).transpose(1, 2).flatten(2)

    def _queries(self, x_BSD: Tensor) -> Tensor:
        gather = self.shards.gather
        if self.config.q_rank is None:
            queries: Tensor = self.q_proj(gather(x_BSD))
        else:
            queries = self.q_b_proj(gather(self.q_a_norm(self.q_a_proj(x_BSD))))
        return queries

    def _by_head(self, x_BSN: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """Split (B, S, heads * sum(sizes)) into one (B, heads, S, size) for each of the sizes."""
        return x_BSN.unflatten(-1, (-1, sum(sizes))).transpose(1, 2).split(sizes, dim=-1)
