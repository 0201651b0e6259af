"""Count the floating-point operations of a token, forward and backward, as published rates count them.

Products of matrices only; the causal half of attention, and of a window what its queries see; no router, no sinks, and
nothing that is computed again. So counted,
published TFLOPS and tokens per second of Mixtral, Qwen3, DeepSeek-V3 and Kimi-K2 agree within 0.3 % (NVIDIA's table).
"""

import functools
from dataclasses import dataclass

from fairseq_moe.planner.shape import ModelShape

__all__ = [
    "LayerFlops",
    "active_parameters",
    "expert_flops_per_token",
    "flops_per_token",
    "hardware_flops_per_token",
    "layer_flops",
]

_PASSES = 6  # two operations per multiplication, of one forward and two backward products


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Hold the operations of a token in one layer, forward and backward.

    Args:
        attention: projections, scores and sums of values.
        dense: a dense network and shared experts.
        experts: of the token's K experts.
    """

    attention: int
    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Operations of all of it."""
        return self.attention + self.dense + self.experts


def _attention(shape: ModelShape, length: int, window: int) -> int:
    latent = shape.latent
    if latent is None:
        projections = 2 * shape.dim * (shape.query_width + shape.key_width)
        # Positions that a query sees, twice: for its score and for its value. Without a window that is all of them.
        near = min(window, length) if window else length
        return projections + near * (2 * length - near) * shape.query_width // length
    query = shape.dim * shape.query_width
    if latent.q_rank:
        query = latent.q_rank * (shape.dim + shape.query_width)
    key = shape.dim * (latent.kv_rank + latent.rope_dim)
    key += latent.kv_rank * shape.num_heads * (latent.nope_dim + latent.value_dim)
    # Half of the positions, each for its score and for its value.
    core = length * (shape.query_width + shape.attended_width) // 2
    return query + key + shape.attended_width * shape.dim + core


def layer_flops(shape: ModelShape, length: int, *, is_moe: bool, hidden: int, window: int = 0) -> LayerFlops:
    """Count a layer's operations for a token.

    Args:
        shape: of the model.
        length: S, positions of a sequence.
        is_moe: whether the layer has experts.
        hidden: width of its network if it has none.
        window: positions that a query sees; 0: all earlier ones.
    """
    matrices = shape.num_expert_matrices * shape.dim
    dense = shape.shared_dim if is_moe else hidden
    experts = shape.top_k * shape.expert_dim if is_moe else 0
    return LayerFlops(
        attention=_PASSES * _attention(shape, length, window),
        dense=_PASSES * matrices * dense,
        experts=_PASSES * matrices * experts,
    )


def _layers(shape: ModelShape, length: int) -> list[LayerFlops]:
    return [
        layer_flops(shape, length, is_moe=is_moe, hidden=shape.dense_dim(index), window=window)
        for index, (is_moe, window) in enumerate(zip(shape.is_moe, shape.windows, strict=True))
    ]


def _mtp_layers(shape: ModelShape, length: int) -> list[LayerFlops]:
    if not shape.trains_mtp:
        return []
    return [layer_flops(shape, length, is_moe=shape.has_experts, hidden=shape.ffn_dim)] * shape.mtp_layers


@functools.lru_cache(maxsize=256)
def flops_per_token(shape: ModelShape, length: int) -> int:
    """Count the useful operations of a token: forward and backward."""
    words = _PASSES * shape.num_words * shape.out_dim
    further = _mtp_layers(shape, length)
    total = sum(layer.total for layer in (*_layers(shape, length), *further)) + words
    return total + len(further) * (words + _PASSES * 2 * shape.dim**2)


def hardware_flops_per_token(shape: ModelShape, length: int, recompute: frozenset[str]) -> int:
    """Count the operations that are carried out: also the forward passes that are computed again."""
    again = 0
    for layer in (*_layers(shape, length), *_mtp_layers(shape, length)):
        if "layers" in recompute:
            again += layer.total
            continue
        has_experts = layer.experts > 0
        again += layer.experts if recompute & {"moe", "experts"} else 0
        again += layer.dense if has_experts and recompute & {"moe", "shared_experts"} else 0
    return flops_per_token(shape, length) + again // 3


def active_parameters(shape: ModelShape, total: int) -> int:
    """Count the parameters that a token passes: K of E experts of each layer.

    Args:
        shape: of the model.
        total: parameters of the whole model, without blocks that guess further.
    """
    matrices = shape.num_expert_matrices * shape.dim * shape.expert_dim
    rows = (2 if shape.is_gated else 1) * shape.expert_dim
    biases = rows + shape.dim if shape.has_ffn_bias else 0
    return total - sum(shape.is_moe) * (shape.num_experts - shape.top_k) * (matrices + biases)


@functools.lru_cache(maxsize=256)
def expert_flops_per_token(shape: ModelShape, length: int) -> int:
    """Count the operations of them that are the experts'."""
    return sum(layer.experts for layer in (*_layers(shape, length), *_mtp_layers(shape, length)))
