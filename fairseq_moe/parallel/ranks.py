"""Number the ranks of every kind of parallelism: coordinates and groups, as whole numbers.

The ranks of a run are seen twice. A pipeline stage's D * C * T = R * E * X ranks lie on two grids, and the same rank
has a place on both:

    rank = ((p * D + d) * C + c) * T + t        dense view:   pipe, data, context, tensor
    rank = ((p * R + r) * E + e) * X + x        sparse view:  pipe, expert_replica, expert, expert_tensor

Attention, embeddings and routers lie on the dense view, experts on the sparse one. The ranks that exchange tokens are
neighbours, so tensor and context ranks are further token shards of that exchange.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from fairseq_moe.errors import ConfigError

__all__ = ["BATCH_RANKS", "BATCH_SHARDS", "DENSE_AXES", "EXPERT_AXES", "RankGrid"]

# The axes of a stage, outermost first.
DENSE_AXES = ("data", "context", "tensor")
EXPERT_AXES = ("expert_replica", "expert", "expert_tensor")
# The ranks that share a micro-batch differ along these alone: each holds other tokens of it.
BATCH_SHARDS = ("context", "tensor")
# And with the stages of a pipeline: all ranks that work on one micro-batch, and read it.
BATCH_RANKS = ("pipe", *BATCH_SHARDS)
_GIVEN = ("pipe", *DENSE_AXES, "expert", "expert_tensor")


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Place the ranks of a run on the two grids.

    Args:
        data: D, ranks that take turns with the batches.
        pipe: P, stages of the pipeline.
        context: C, parts of a sequence.
        tensor: T, parts of a layer's heads and widths.
        expert: E, ranks of which each holds other experts.
        expert_tensor: X, parts of an expert's width.

    Raises:
        ConfigError: a size is below 1, or a stage's ranks do not divide by those that hold different experts.
    """

    data: int
    pipe: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        low = [f"{axis} {getattr(self, axis)}" for axis in _GIVEN if getattr(self, axis) < 1]
        if low:
            raise ConfigError(
                [f"sizes of parallelism are {', '.join(low)}, expected at least 1; raise them."]
            )
        if self.stage_size % (self.expert * self.expert_tensor):
            raise ConfigError(
                [
                    f"{self.stage_size} ranks (data {self.data} x context {self.context} x tensor {self.tensor}) "
                    f"do not divide by expert {self.expert} x expert_tensor {self.expert_tensor}; choose divisors."
                ]
            )

    @property
    def stage_size(self) -> int:
        """Number of ranks of one pipeline stage."""
        return self.data * self.context * self.tensor

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return self.pipe * self.stage_size

    @property
    def expert_replica(self) -> int:
        """Number of ranks that hold the same part of the same experts: R."""
        return self.stage_size // (self.expert * self.expert_tensor)

    def size(self, axes: Iterable[str]) -> int:
        """Multiply the sizes of axes: how many ranks differ in these alone."""
        return prod(getattr(self, axis) for axis in axes)

    def coordinate(self, rank: int, axis: str) -> int:
        """Find the place of ``rank`` along an axis."""
        return self._coordinates(rank, _view_of((axis,)))[axis]

    def num_slots(self, axes: Iterable[str]) -> int:
        """Count the groups along these axes."""
        return self.world_size // self.size(axes)

    def slot(self, rank: int, axes: Iterable[str]) -> int:
        """Find which group along these axes ``rank`` is in: ranks that differ in them alone share one.

        The axes must be of one view, here and in ``groups``.
        """
        axes = tuple(axes)
        view = _view_of(axes)
        own, number = self._coordinates(rank, view), 0
        for axis in view:
            if axis not in axes:
                number = number * getattr(self, axis) + own[axis]
        return number

    def groups(self, axes: Iterable[str]) -> list[list[int]]:
        """List the ranks of every group along these axes, in the order of their slots; each rank is in one of them."""
        axes = tuple(axes)
        found: list[list[int]] = [[] for _ in range(self.num_slots(axes))]
        for rank in range(self.world_size):
            found[self.slot(rank, axes)].append(rank)
        return found

    def _coordinates(self, rank: int, view: tuple[str, ...]) -> dict[str, int]:
        found = {}
        for axis in reversed(view):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found


def _view_of(axes: tuple[str, ...]) -> tuple[str, ...]:
    for stage in (DENSE_AXES, EXPERT_AXES):
        view = ("pipe", *stage)
        if set(axes) <= set(view):
            return view
    raise ValueError(f"{', '.join(axes)} are not axes of one view: {DENSE_AXES} or {EXPERT_AXES}, and pipe")
