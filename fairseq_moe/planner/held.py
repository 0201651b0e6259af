"""Count the part of a model's parameters that one rank holds: to the number, whole or sharded."""

import functools
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from fairseq_moe.modules.parts import part_slices
from fairseq_moe.parallel.placement import shard_dim
from fairseq_moe.parallel.ranks import DENSE_AXES, EXPERT_AXES, RankGrid
from fairseq_moe.planner.mapping import Mapping, States
from fairseq_moe.planner.parameters import Entries, Entry, Part

__all__ = ["Held", "held_by", "held_of_kinds"]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Count numbers of parameters that a rank holds.

    Args:
        dense: not of experts, trained.
        expert: of experts, trained.
        frozen: of either, not trained.
    """

    dense: int = 0
    expert: int = 0
    frozen: int = 0

    def __add__(self, other: "Held") -> "Held":
        """Add up two counts."""
        return Held(
            dense=self.dense + other.dense,
            expert=self.expert + other.expert,
            frozen=self.frozen + other.frozen,
        )

    def __mul__(self, count: int) -> "Held":
        """Count so many of the same."""
        return Held(dense=self.dense * count, expert=self.expert * count, frozen=self.frozen * count)

    @property
    def trained(self) -> int:
        """Number of those that have gradients."""
        return self.dense + self.expert

    @property
    def total(self) -> int:
        """Number of all of them, trained or not."""
        return self.trained + self.frozen


class _Place(NamedTuple):
    """Say where a rank lies along the axes that matter to a parameter, and how many there are along each.

    Args:
        indices: by axis along which it may be cut.
        counts: ranks along each of those.
        shard: number of the rank's shard.
        shards: of each part.
    """

    indices: tuple[int, int]
    counts: tuple[int, int]
    shard: int
    shards: int


_AXES = {False: ("tensor", ""), True: ("expert", "expert_tensor")}


@functools.lru_cache(maxsize=1 << 12)
def _coordinates(grid: RankGrid, rank: int) -> dict[str, int]:
    return {axis: grid.coordinate(rank, axis) for axis in (*DENSE_AXES, *EXPERT_AXES)}


def _places(mapping: Mapping, rank: int, *, sharded: bool) -> dict[bool, _Place]:
    """Find a rank's place for dense parameters, and for those of experts."""
    grid = mapping.grid
    at = _coordinates(grid, rank)
    return {
        False: _Place(
            indices=(at["tensor"], 0),
            counts=(grid.tensor, 1),
            shard=at["data"] * grid.context + at["context"] if sharded else 0,
            shards=mapping.dense_shards if sharded else 1,
        ),
        True: _Place(
            indices=(at["expert"], at["expert_tensor"]),
            counts=(grid.expert, grid.expert_tensor),
            shard=at["expert_replica"] if sharded else 0,
            shards=mapping.expert_shards if sharded else 1,
        ),
    }


def _own_numel(entry: Entry, place: _Place) -> int:
    """Count the elements of a rank's shard of its part, cut as ``modules.parts`` and torch's ``fully_shard`` do."""
    shape = list(entry.shape)
    for cut in entry.placement.cuts:
        axis = _AXES[entry.is_expert].index(cut.axis)
        count = place.counts[axis]
        if cut.size is None:
            shape[cut.dim] //= count
        else:
            (rows,) = part_slices(cut.size, index=place.indices[axis], count=count)
            shape[cut.dim] = rows.stop - rows.start
    if place.shards == 1:
        return prod(shape)
    dim = shard_dim(shape, place.shards)
    chunk = -(-shape[dim] // place.shards)
    return prod(shape) // shape[dim] * min(chunk, max(shape[dim] - place.shard * chunk, 0))


@functools.lru_cache(maxsize=1 << 14)
def _held_of(entries: Entries, is_expert: bool, place: _Place) -> tuple[int, int]:
    """Count the trained and the frozen numbers among the experts' parameters, or among all others."""
    counts = {True: 0, False: 0}
    for entry in entries:
        if entry.is_expert == is_expert:
            counts[entry.is_trained] += _own_numel(entry, place)
    return counts[True], counts[False]


def held_by(parts: list[Part], mapping: Mapping, rank: int, *, sharded: bool) -> Held:
    """Count what a rank holds of parts of its stage.

    Args:
        parts: of ``stage_parts``.
        mapping: of the run.
        rank: of all ranks.
        sharded: between updates, when each holds its shards; else what it computes with.
    """
    if sharded and mapping.states is States.FAIRSCALE:
        return _flat_held(parts, mapping)
    found = Held()
    for held, count in held_of_kinds(parts, mapping, rank, sharded=sharded):
        found += held * count
    return found


def held_of_kinds(parts: list[Part], mapping: Mapping, rank: int, *, sharded: bool) -> list[tuple[Held, int]]:
    """Count what a rank holds of each kind of part, in order, and how many there are of the kind."""
    places = _places(mapping, rank, sharded=sharded)
    found = []
    for entries, count in Counter(part.entries for part in parts).items():
        dense, frozen = _held_of(entries, False, places[False])
        expert, frozen_expert = _held_of(entries, True, places[True])
        found.append((Held(dense=dense, expert=expert, frozen=frozen + frozen_expert), count))
    return found


def _flat_held(parts: list[Part], mapping: Mapping) -> Held:
    """Count what each rank holds of fairscale's flat parameters, the padding at their ends included.

    Experts are flat by themselves, over their replicas; so is the rest of a layer that is large enough to be wrapped,
    and all else, over all ranks.
    """
    world, found, around = mapping.grid.world_size, Held(), 0
    for part in parts:
        experts = sum(entry.numel for entry in part.entries if entry.is_expert) // mapping.grid.expert
        rest = sum(entry.numel for entry in part.entries if not entry.is_expert)
        experts = -(-experts // mapping.expert_shards)
        found += Held(expert=experts)
        least = 0 if "layers" in mapping.recompute else mapping.min_params_to_wrap
        if part.layer >= 0 and rest + experts >= least:
            found += Held(dense=-(-rest // world))
        else:
            around += rest
    return found + Held(dense=-(-around // world))
