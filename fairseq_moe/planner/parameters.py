"""List every parameter of a model: name, shape, and how it lies on the ranks.

What is cut where is asked of ``parallel.placement``; names and shapes are those of ``models`` and ``modules``, which
tests/unit/planner/test_parameters.py builds and counts.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from fairseq_moe.parallel.placement import (
    DENSE,
    TENSOR_COLUMNS,
    TENSOR_GATED_ROWS,
    TENSOR_ROWS,
    Placement,
    expert_placements,
    vocabulary_placement,
)
from fairseq_moe.planner.mapping import Mapping
from fairseq_moe.planner.shape import ModelShape

__all__ = ["Entries", "Entry", "Part", "layer_parts", "model_parts", "stage_parts"]

_COSINE_DIM = 16  # of X-MoE's router


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Describe one parameter of a model.

    Args:
        name: within its module.
        shape: of the whole tensor; of experts, of the stack of all.
        placement: how it lies on the ranks.
        is_trained: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    placement: Placement = DENSE
    is_trained: bool = True

    @property
    def is_expert(self) -> bool:
        """Tell whether it belongs to experts."""
        return "expert" in self.placement.cut_over

    @property
    def numel(self) -> int:
        """Number of elements of the whole."""
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class Entries:
    """List parameters that are built together; equal only to itself, so that what was counted is found quickly."""

    listed: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the parameters."""
        return iter(self.listed)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Hold what is gathered and sharded at once: a layer, a block that guesses further, or what is around them.

    Args:
        name: of the part.
        entries: its parameters.
        layer: its number; -1: it is none.
    """

    name: str
    entries: Entries
    layer: int = -1


def _linear(name: str, rows: int, columns: int, placement: Placement, *, bias: bool) -> Iterator[Entry]:
    yield Entry(name=f"{name}.weight", shape=(rows, columns), placement=placement)
    if bias:  # of a matrix whose columns are cut, the output's bias is whole
        own = DENSE if placement is TENSOR_COLUMNS else placement
        yield Entry(name=f"{name}.bias", shape=(rows,), placement=own)


def _norm(name: str, shape: ModelShape) -> Iterator[Entry]:
    yield Entry(name=f"{name}.weight", shape=(shape.dim,))
    if not shape.is_rms:
        yield Entry(name=f"{name}.bias", shape=(shape.dim,))


def _attention(shape: ModelShape) -> Iterator[Entry]:
    if shape.latent is not None:
        yield from _latent_attention(shape)
        return
    has_bias = shape.attention_bias in ("qkv", "all")
    for name, rows in (("q", shape.query_width), ("k", shape.key_width), ("v", shape.key_width)):
        yield from _linear(f"{name}_proj", rows, shape.dim, TENSOR_ROWS, bias=has_bias)
    all_biased = shape.attention_bias == "all"
    yield from _linear("out_proj", shape.dim, shape.query_width, TENSOR_COLUMNS, bias=all_biased)
    if shape.has_sinks:
        yield Entry(name="sinks", shape=(shape.num_heads,), placement=TENSOR_ROWS)
    if shape.qk_norm == "head":
        yield from (Entry(name=f"{name}_norm.weight", shape=(shape.head_dim,)) for name in "qk")
    if shape.qk_norm == "full":
        yield Entry(name="q_norm.weight", shape=(shape.query_width,), placement=TENSOR_ROWS)
        yield Entry(name="k_norm.weight", shape=(shape.key_width,), placement=TENSOR_ROWS)


def _latent_attention(shape: ModelShape) -> Iterator[Entry]:
    latent, has_bias = shape.latent, shape.attention_bias == "all"
    assert latent is not None
    if latent.q_rank:
        yield from _linear("q_a_proj", latent.q_rank, shape.dim, DENSE, bias=has_bias)
        yield Entry(name="q_a_norm.weight", shape=(latent.q_rank,))
        yield from _linear("q_b_proj", shape.query_width, latent.q_rank, TENSOR_ROWS, bias=False)
    else:
        yield from _linear("q_proj", shape.query_width, shape.dim, TENSOR_ROWS, bias=False)
    yield from _linear("kv_a_proj", latent.kv_rank + latent.rope_dim, shape.dim, DENSE, bias=has_bias)
    yield Entry(name="kv_a_norm.weight", shape=(latent.kv_rank,))
    rows = shape.num_heads * (latent.nope_dim + latent.value_dim)
    yield from _linear("kv_b_proj", rows, latent.kv_rank, TENSOR_ROWS, bias=False)
    yield from _linear("out_proj", shape.dim, shape.attended_width, TENSOR_COLUMNS, bias=has_bias)


def _dense_network(shape: ModelShape, hidden: int) -> Iterator[Entry]:
    first, placement = (2 * hidden, TENSOR_GATED_ROWS) if shape.is_gated else (hidden, TENSOR_ROWS)
    yield from _linear("fc1", first, shape.dim, placement, bias=shape.has_ffn_bias)
    yield from _linear("fc2", shape.dim, hidden, TENSOR_COLUMNS, bias=shape.has_ffn_bias)


def _experts(shape: ModelShape, *, is_cut: bool) -> Iterator[Entry]:
    trains_router, trains_experts = (name not in shape.frozen for name in ("routers", "experts"))
    count, dim, hidden = shape.num_experts, shape.dim, shape.expert_dim
    if shape.is_cosine:
        yield Entry(name="router.projection", shape=(_COSINE_DIM, dim), is_trained=trains_router)
    columns = _COSINE_DIM if shape.is_cosine else dim
    yield Entry(name="router.weight", shape=(count, columns), is_trained=trains_router)
    if shape.has_router_bias:
        yield Entry(name="router.bias", shape=(count,), is_trained=trains_router)
    placements = expert_placements(is_gated=shape.is_gated, is_cut=is_cut)
    rows = 2 * hidden if shape.is_gated else hidden
    shapes: dict[str, tuple[int, ...]] = {
        "fc1_weight": (count, rows, dim),
        "fc2_weight": (count, dim, hidden),
    }
    if shape.has_ffn_bias:
        shapes |= {"fc1_bias": (count, rows), "fc2_bias": (count, dim)}
    for name, size in shapes.items():
        yield Entry(name=f"experts.{name}", shape=size, placement=placements[name], is_trained=trains_experts)
    if shape.shared_dim:
        first = 2 * shape.shared_dim if shape.is_gated else shape.shared_dim
        yield from _linear("shared_experts.fc1", first, dim, DENSE, bias=shape.has_ffn_bias)
        yield from _linear("shared_experts.fc2", dim, shape.shared_dim, DENSE, bias=shape.has_ffn_bias)
        if shape.has_shared_gate:
            yield from _linear("shared_experts.gate", 1, dim, DENSE, bias=False)


def _layer(shape: ModelShape, *, is_moe: bool, hidden: int, is_cut: bool) -> tuple[Entry, ...]:
    network = _experts(shape, is_cut=is_cut) if is_moe else _dense_network(shape, hidden)
    norms = (*_norm("self_attn_layer_norm", shape), *_norm("final_layer_norm", shape))
    return (*_attention(shape), *norms, *network)


@functools.lru_cache(maxsize=64)
def _layer_entries(shape: ModelShape, is_moe: bool, hidden: int, is_cut: bool) -> Entries:
    return Entries(_layer(shape, is_moe=is_moe, hidden=hidden, is_cut=is_cut))


def layer_parts(shape: ModelShape, layers: Iterable[int], *, is_cut: bool) -> Iterator[Part]:
    """List the parts that decoder layers are.

    Args:
        shape: of the model.
        layers: their numbers.
        is_cut: whether each expert's width is divided over ranks.
    """
    for index in layers:
        entries = _layer_entries(shape, shape.is_moe[index], shape.dense_dim(index), is_cut)
        yield Part(name=f"layer {index}", entries=entries, layer=index)


@functools.lru_cache(maxsize=1 << 12)
def _layer_parts(shape: ModelShape, layers: tuple[int, ...], is_cut: bool) -> tuple[Part, ...]:
    return tuple(layer_parts(shape, layers, is_cut=is_cut))


@functools.lru_cache(maxsize=64)
def _mtp_entries(shape: ModelShape, is_cut: bool) -> Entries:
    layer = _layer(shape, is_moe=shape.has_experts, hidden=shape.ffn_dim, is_cut=is_cut)
    norms = [entry for name in ("embed_norm", "hidden_norm", "norm") for entry in _norm(name, shape)]
    proj = Entry(name="proj.weight", shape=(shape.dim, 2 * shape.dim))
    listed = (*norms, proj, *layer)
    return Entries(tuple(replace(each, is_trained=each.is_trained and shape.trains_mtp) for each in listed))


@functools.lru_cache(maxsize=64)
def _around_entries(shape: ModelShape, is_first: bool, is_last: bool) -> Entries:
    words = Entry(
        name="embed_tokens.weight",
        shape=(shape.num_words, shape.in_dim),
        placement=vocabulary_placement(shape.num_words),
    )
    found: list[Entry] = []
    if is_first or (is_last and (shape.is_tied or shape.mtp_layers > 0)):
        found.append(words)
    if is_first:
        found += _before_layers(shape)
    if is_last:
        found += _after_layers(shape)
    return Entries(tuple(found))


def stage_parts(shape: ModelShape, mapping: Mapping, pipe: int) -> list[Part]:
    """List what a pipeline rank holds, whole: its layers, blocks that guess further, and, last, what is around them."""
    is_first, is_last = pipe == 0, pipe == mapping.grid.pipe - 1
    is_cut = mapping.grid.expert_tensor > 1
    parts = list(_layer_parts(shape, mapping.layers_of(pipe, shape.num_layers), is_cut))
    if is_last and shape.mtp_layers:
        entries = _mtp_entries(shape, is_cut)
        parts += [Part(name=f"mtp {index}", entries=entries) for index in range(shape.mtp_layers)]
    return [*parts, Part(name="around", entries=_around_entries(shape, is_first, is_last))]


def _before_layers(shape: ModelShape) -> Iterator[Entry]:
    if shape.in_dim != shape.dim:
        yield Entry(name="project_in_dim.weight", shape=(shape.dim, shape.in_dim))
    if shape.num_positions:
        yield Entry(name="embed_positions.weight", shape=(shape.num_positions, shape.dim))
    if shape.embedding_norm:  # stock's own, whatever the layers' norms are
        yield from (
            Entry(name=f"layernorm_embedding.{each}", shape=(shape.dim,)) for each in ("weight", "bias")
        )


def _after_layers(shape: ModelShape) -> Iterator[Entry]:
    if shape.final_norm:
        yield from _norm("layer_norm", shape)
    if shape.out_dim != shape.dim:
        yield Entry(name="project_out_dim.weight", shape=(shape.out_dim, shape.dim))
    if not shape.is_tied:
        yield Entry(
            name="output_projection.weight",
            shape=(shape.num_words, shape.out_dim),
            placement=vocabulary_placement(shape.num_words),
        )


def model_parts(shape: ModelShape) -> list[Part]:
    """List all parameters of a model on one rank."""
    parts = list(layer_parts(shape, range(shape.num_layers), is_cut=False))
    if shape.mtp_layers:
        entries = _mtp_entries(shape, False)
        parts += [Part(name=f"mtp {index}", entries=entries) for index in range(shape.mtp_layers)]
    return [*parts, Part(name="around", entries=_around_entries(shape, True, True))]
