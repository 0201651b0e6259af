"""Count what a rank sends along each axis in an update, by the formulas of ``parallel.traffic``.

Those are equal to the byte to what tests/distributed/test_bytes_sent.py counts of every collective. Rows of experts lie
evenly on the ranks, and nothing is dropped; ``load`` says what unequal ones do.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fairseq_moe.parallel.schedule import with_dummies
from fairseq_moe.parallel.stages import StageLayout
from fairseq_moe.parallel.traffic import ExpertRows, SplitPass, summed_bytes
from fairseq_moe.planner.devices import Device
from fairseq_moe.planner.held import held_by
from fairseq_moe.planner.mapping import Mapping, Precision, States
from fairseq_moe.planner.parameters import Entries, stage_parts
from fairseq_moe.planner.plan import Sent
from fairseq_moe.planner.shape import ModelShape

__all__ = ["distinct_stages", "expert_rows", "sent_in_update", "spans_nodes"]

_SIDE_NUMBERS = 9  # of a layer, besides 12 for each expert: what later stages must know of earlier ones'
_FATES = 12
_LOSS_NUMBERS = 8  # summed once for all layers: losses, entropy and two times
_WIDE_BYTES = 4
_KINDS = ((True, False), (False, False), (False, True))  # of layers: with experts, and alternate ones


@dataclass(frozen=True, kw_only=True)
class _Counter:
    """Count for one run.

    Args:
        shape: of the model.
        mapping: of the run.
        precision: of each number.
    """

    shape: ModelShape
    mapping: Mapping
    precision: Precision

    @property
    def value_bytes(self) -> int:
        """Bytes of a number that travels between layers."""
        return self.precision.gathered

    def forwards(self, part: str) -> int:
        """Count the forward passes of a part of a layer: 2 where it is computed again."""
        return 2 if self.mapping.recompute & {"layers", part} else 1

    @property
    def split(self) -> SplitPass:
        """Describe what ranks of a micro-batch send one another."""
        mapping = self.mapping
        return SplitPass(
            tokens=mapping.context_tokens,
            value_bytes=self.value_bytes,
            context=mapping.grid.context,
            tensor=mapping.grid.tensor,
            forwards=self.forwards("layers"),
        )

    def tensor_bytes(self, pipe: int) -> int:
        """Count what a micro-batch sends over tensor."""
        shape, split, mapping = self.shape, self.split, self.mapping
        layers = mapping.layers_of(pipe, shape.num_layers)
        latent = shape.latent
        gathered = shape.dim
        if latent is not None:
            gathered = (latent.q_rank or shape.dim) + latent.kv_rank + latent.rope_dim
        found = len(layers) * split.block(gathered=gathered, scattered=shape.dim)
        found += sum(
            split.block(gathered=shape.dim, scattered=shape.dim) for each in layers if not shape.is_moe[each]
        )
        if shape.qk_norm == "full":
            found += len(layers) * split.squares(2)
        is_end = (pipe == 0) + (pipe == mapping.grid.pipe - 1)
        return found + split.ends(shape.dim) * is_end // 2

    def context_bytes(self, pipe: int) -> int:
        """Count what a micro-batch sends over context."""
        latent = self.shape.latent
        width = 2 * self.shape.key_width // self.mapping.grid.tensor
        if latent is not None:
            width = latent.kv_rank + latent.rope_dim
        layers = self.mapping.layers_of(pipe, self.shape.num_layers)
        return len(layers) * self.split.keys(width) + self.split.loss() * (pipe == self.mapping.grid.pipe - 1)

    def statistics_bytes(self, pipe: int) -> int:
        """Count what a micro-batch sends over context and tensor for counts and losses."""
        count = self._moe_layers(pipe)
        if self.mapping.grid.context * self.mapping.grid.tensor == 1 or not count:
            return 0
        return self.split.statistics(layers=count, experts=self.shape.num_experts, losses=_LOSS_NUMBERS)

    def _moe_layers(self, pipe: int) -> int:
        layers = self.mapping.layers_of(pipe, self.shape.num_layers)
        further = self.shape.mtp_layers if self.shape.trains_mtp and self._is_last(pipe) else 0
        return sum(self.shape.is_moe[each] for each in layers) + (further if self.shape.has_experts else 0)

    def _is_last(self, pipe: int) -> bool:
        return pipe == self.mapping.grid.pipe - 1

    def expert_bytes(self, pipe: int) -> int:
        """Count what a micro-batch sends between ranks with other experts."""
        count = self._moe_layers(pipe)
        if not count:
            return 0
        rows = expert_rows(self.shape, self.mapping, self.value_bytes)
        if self.mapping.dispatcher == "allgather":
            return count * rows.gathered()
        return count * (rows.sent() + rows.counted(self.shape.num_experts))

    def pipe_bytes(self) -> int:
        """Count what a micro-batch sends a rank of a middle stage to its neighbours, forward and backward."""
        mapping, shape = self.mapping, self.shape
        if mapping.grid.pipe == 1:
            return 0
        side = (
            sum(shape.is_moe)
            * (_FATES * shape.num_experts + _SIDE_NUMBERS)
            * max(self.value_bytes, _WIDE_BYTES)
        )
        one_way = mapping.own_tokens * shape.dim * self.value_bytes + side
        return 2 * one_way * mapping.virtual

    def gradient_bytes(self, pipe: int) -> Iterator[tuple[str, int]]:
        """Count what an update sends to sum gradients, and to gather sharded weights."""
        mapping, grid = self.mapping, self.mapping.grid
        parts = stage_parts(self.shape, mapping, pipe)
        first = pipe * grid.stage_size
        held = held_by(parts, mapping, first, sharded=False)
        for axis, numbers, ranks in (
            ("data", held.dense, grid.data * grid.context),
            ("expert_replica", held.expert, grid.expert_replica),
        ):
            own = summed_bytes(numbers * self.precision.grad, ranks)
            if mapping.states in (States.ZERO_3, States.FAIRSCALE):
                own = own // 2 * (2 * mapping.micro_batches + 1)
            yield axis, own
        if grid.tensor > 1:
            yield "tensor", summed_bytes(self._whole_on_tensor(pipe) * self.precision.grad, grid.tensor)

    def _whole_on_tensor(self, pipe: int) -> int:
        """Count dense numbers of which every tensor rank has a copy."""
        return sum(_uncut(part.entries) for part in stage_parts(self.shape, self.mapping, pipe))


@functools.lru_cache(maxsize=256)
def _uncut(entries: Entries) -> int:
    return sum(e.numel for e in entries if e.is_trained and not e.is_expert and not e.placement.cuts)


def distinct_stages(shape: ModelShape, mapping: Mapping) -> tuple[int, ...]:
    """List stages of which no two have the same layers and ends; the first of each kind, which keeps most."""
    return _distinct_stages(shape, mapping.stages(shape.num_layers))


@functools.lru_cache(maxsize=1 << 12)
def _distinct_stages(shape: ModelShape, layout: StageLayout) -> tuple[int, ...]:
    found: dict[tuple[int, ...], int] = {}
    for pipe in range(layout.pipe):
        layers = [index for chunk in range(layout.virtual) for index in layout.layers_of(pipe, chunk)]
        kinds = Counter((shape.is_moe[each], shape.is_alternate[each]) for each in layers)
        key = (pipe == 0, pipe == layout.pipe - 1, *(kinds[kind] for kind in _KINDS))
        found.setdefault(key, pipe)
    return tuple(found.values())


def expert_rows(shape: ModelShape, mapping: Mapping, value_bytes: int) -> ExpertRows:
    """Describe the rows that a rank sends for one layer of experts."""
    again = mapping.recompute & {"layers", "moe"}
    return ExpertRows(
        tokens=mapping.own_tokens,
        top_k=shape.top_k,
        dim=shape.dim,
        value_bytes=value_bytes,
        expert=mapping.grid.expert,
        expert_tensor=mapping.grid.expert_tensor,
        forwards=2 if again else 1,
    )


def spans_nodes(mapping: Mapping, axes: Iterable[str], ranks_per_node: int) -> bool:
    """Tell whether ranks that differ in these axes alone lie on several nodes.

    Ranks are numbered from the innermost axis: the group of rank 0 reaches from it to the last along all of them.
    """
    grid, reach = mapping.grid, 0
    strides = {
        "tensor": 1,
        "context": grid.tensor,
        "data": grid.tensor * grid.context,
        "expert_tensor": 1,
        "expert": grid.expert_tensor,
        "expert_replica": grid.expert_tensor * grid.expert,
        "pipe": grid.stage_size,
    }
    for axis in axes:
        reach += (getattr(grid, axis) - 1) * strides[axis]
    return reach >= ranks_per_node


def sent_in_update(
    shape: ModelShape, mapping: Mapping, precision: Precision, device: Device
) -> tuple[Sent, ...]:
    """List what a rank sends in an update along each axis that is larger than 1; of several stages, the most."""
    counter = _Counter(shape=shape, mapping=mapping, precision=precision)
    stages, passes = distinct_stages(shape, mapping), mapping.micro_batches
    per_pass = (
        (("tensor",), "tokens of attention and dense networks, words", counter.tensor_bytes),
        (("context",), "keys and values", counter.context_bytes),
        (("context", "tensor"), "counts and losses of experts", counter.statistics_bytes),
        (("expert", "expert_tensor"), "rows of experts", counter.expert_bytes),
    )
    found = [
        (axes, what, max(count(pipe) for pipe in stages) * passes, True)
        for axes, what, count in per_pass
        if mapping.grid.size(axes) > 1
    ]
    with_fill = with_dummies(mapping.grid.pipe, mapping.virtual, passes)
    found.append((("pipe",), "hidden values and their gradients", counter.pipe_bytes() * with_fill, False))
    sums: dict[str, int] = {}
    for pipe in stages:
        for axis, count in counter.gradient_bytes(pipe):
            sums[axis] = max(sums.get(axis, 0), count)
    shards = mapping.states in (States.ZERO_1, States.ZERO_3, States.FAIRSCALE)
    what = "gradients and weights" if shards else "gradients"
    found += [((axis,), what, count, False) for axis, count in sums.items()]
    return tuple(
        Sent(
            axis=" x ".join(axes),
            what=what,
            sent_bytes=count,
            crosses_nodes=spans_nodes(mapping, axes, device.ranks_per_node),
            waits=waits,
        )
        for axes, what, count, waits in found
        if count
    )
