"""Process groups of the axes along which ranks work together.

``parallel.ranks`` numbers the ranks of each axis, and ``parallel.placement`` says over which axes a parameter's copies
are summed; here the groups of ranks that follow from both are made, once for each layout of the experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fairseq_moe.distributed.all_to_all import GroupExchange
from fairseq_moe.modules.dispatch.exchange import Exchange, LocalExchange
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import COPIED_OVER, DENSE_SHARDS, EXPERT_SHARDS, Placement
from fairseq_moe.parallel.ranks import BATCH_RANKS, BATCH_SHARDS, DENSE_AXES, RankGrid

__all__ = [
    "ParallelMesh",
    "local_experts_only",
    "parallel_mesh",
    "rank",
    "world_size",
]

# A ContextVar, because models are built inside stock's loaders, which pass nothing of ours on to ``parallel_mesh``.
_LOCAL_ONLY: ContextVar[bool] = ContextVar("local_experts_only", default=False)


def world_size() -> int:
    """Count the ranks: 1 before torch.distributed is initialised, or within ``local_experts_only``."""
    if _LOCAL_ONLY.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Return this process's rank: 0 before torch.distributed is initialised, or within ``local_experts_only``."""
    return 0 if world_size() == 1 else dist.get_rank()


@contextmanager
def local_experts_only() -> Iterator[None]:
    """Let models that are built or loaded inside hold every expert and never communicate (generation, hub loading)."""
    token = _LOCAL_ONLY.set(True)
    try:
        yield
    finally:
        _LOCAL_ONLY.reset(token)


# The ranks that exchange tokens: each holds other experts, or other parts of them.
_EXCHANGE = ("expert", "expert_tensor")
_DATA = ("data",)
_CONTEXT = ("context",)
_TENSOR = ("tensor",)
_PIPE = ("pipe",)


@dataclass(frozen=True, kw_only=True)
class ParallelMesh:
    """Holds the process groups of one expert layout.

    Args:
        layout: who owns which expert.
        rank: this process.
        groups_by_axes: this rank's group along the axes that are in use; none in a single process.
        ends: this rank and the one with the same parts at the other end of the pipeline, which share tied words; None
            without a pipeline, and between its ends.
    """

    layout: ExpertLayout
    rank: int
    groups_by_axes: Mapping[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict)
    ends: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParallelMesh":
        return self  # process groups cannot be copied, and a copy of the model talks to the same ranks

    @property
    def ranks(self) -> RankGrid:
        """The ranks, numbered along each axis."""
        return self.layout.ranks

    def sum_over_stage(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all ranks of this rank's stage, in place, and return it."""
        if self.stage is not None:
            dist.all_reduce(tensor, group=self.stage)
        return tensor

    def group_of_copies(self, placement: Placement) -> dist.ProcessGroup | None:
        """Find the ranks that hold the same numbers of such a parameter; None in a single process."""
        return self.groups_by_axes.get(placement.copied_over)

    @property
    def data(self) -> dist.ProcessGroup | None:
        """Ranks that take turns with the batches, as stock's data-parallel ranks do; None in a single process."""
        return self.groups_by_axes.get(_DATA)

    @property
    def context(self) -> dist.ProcessGroup | None:
        """Ranks that hold other parts of the same sequences; None in a single process."""
        return self.groups_by_axes.get(_CONTEXT)

    @property
    def tensor(self) -> dist.ProcessGroup | None:
        """Ranks that hold other heads and widths, and between blocks other tokens; None in a single process."""
        return self.groups_by_axes.get(_TENSOR)

    @property
    def batch_shards(self) -> dist.ProcessGroup | None:
        """Ranks that read the same micro-batches, and hold other tokens of them; None in a single process."""
        return self.groups_by_axes.get(BATCH_SHARDS)

    @property
    def num_batch_shards(self) -> int:
        """Number of ranks that read the same micro-batches."""
        return self.ranks.size(BATCH_SHARDS)

    @property
    def num_batch_ranks(self) -> int:
        """Number of ranks that read the same micro-batches, all stages of a pipeline together."""
        return self.ranks.size(BATCH_RANKS)

    @property
    def pipe(self) -> dist.ProcessGroup | None:
        """Ranks that hold other layers, and the same parts of them; None in a single process."""
        return self.groups_by_axes.get(_PIPE)

    @property
    def stage(self) -> dist.ProcessGroup | None:
        """Ranks that hold parts of the same layers; None in a single process."""
        return self.groups_by_axes.get(DENSE_AXES)

    @property
    def pipe_index(self) -> int:
        """Number of this rank's stage: p."""
        return self.ranks.coordinate(self.rank, "pipe")

    def rank_of_stage(self, index: int) -> int:
        """Find the rank that holds the same parts of another stage."""
        return self.rank + (index - self.pipe_index) * self.ranks.stage_size

    def rank_in_stage(self, place: int) -> int:
        """Find a rank of this rank's stage by its number there, from 0."""
        return self.pipe_index * self.ranks.stage_size + place

    @property
    def dense_shards(self) -> dist.ProcessGroup | None:
        """Ranks over which states of what are no experts can be sharded; None in a single process."""
        return self.groups_by_axes.get(DENSE_SHARDS)

    @property
    def expert_shards(self) -> dist.ProcessGroup | None:
        """Ranks over which states of this rank's experts can be sharded; None in a single process."""
        return self.groups_by_axes.get(EXPERT_SHARDS)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """List every process group; none in a single process."""
        return list(
            dict.fromkeys([*self.groups_by_axes.values(), *([] if self.ends is None else [self.ends])])
        )

    def exchange(self) -> Exchange:
        """Make the token exchange of this rank's expert group; local when the group has one rank."""
        group = self.groups_by_axes.get(_EXCHANGE)
        if group is None or self.ranks.size(_EXCHANGE) == 1:
            return LocalExchange()
        return GroupExchange(group)


_MESHES: dict[tuple[dist.ProcessGroup, ExpertLayout], ParallelMesh] = {}


def parallel_mesh(
    num_experts: int,
    ep_size: int | None = None,
    expert_tensor: int = 1,
    *,
    tensor: int = 1,
    context: int = 1,
    pipe: int = 1,
) -> ParallelMesh:
    """Make, or find, the mesh for ``num_experts`` over the current ranks; a process group's first call is collective.

    Raises:
        ConfigError: the experts do not divide over the ranks.
    """
    layout = ExpertLayout(
        num_experts=num_experts,
        world_size=world_size(),
        given_ep_size=ep_size,
        expert_tensor=expert_tensor,
        tensor=tensor,
        context=context,
        pipe=pipe,
    )
    if world_size() == 1:
        return ParallelMesh(layout=layout, rank=0)
    world = dist.group.WORLD
    assert world is not None
    key = (world, layout)
    if key not in _MESHES:
        for stale in [k for k in _MESHES if k[0] is not world]:
            del _MESHES[stale]
        _MESHES[key] = ParallelMesh(
            layout=layout,
            rank=rank(),
            groups_by_axes=_make_groups(layout.ranks, world),
            ends=_make_ends(layout.ranks),
        )
    return _MESHES[key]


def _make_groups(ranks: RankGrid, world: dist.ProcessGroup) -> dict[tuple[str, ...], dist.ProcessGroup]:
    """Make this rank's group of every set of axes that is in use; collective, in the same order on every rank."""
    made: dict[tuple[str, ...], dist.ProcessGroup] = {}
    known: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {(tuple(range(ranks.world_size)),): world}
    for axes in dict.fromkeys((*COPIED_OVER, _EXCHANGE, _DATA, _CONTEXT, _TENSOR, BATCH_SHARDS, _PIPE)):
        groups = tuple(tuple(members) for members in ranks.groups(axes))
        if groups not in known:  # where an axis has one rank, two sets of axes have the same groups
            for members in groups:
                group = dist.new_group(members)
                if rank() in members:
                    known[groups] = group
        made[axes] = known[groups]
    return made


def _make_ends(ranks: RankGrid) -> dist.ProcessGroup | None:
    """Make the groups of the pipeline's first and last stages; collective, in the same order on every rank."""
    found = None
    if ranks.pipe > 1:
        for column in ranks.groups(_PIPE):
            members = [column[0], column[-1]]
            group = dist.new_group(members)
            found = group if rank() in members else found
    return found
