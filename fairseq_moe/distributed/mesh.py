"""The same ranks seen twice: as a dense mesh and as a sparse (expert) mesh.

Attention, embeddings and router weights live on the dense mesh, whose only axis today is data parallelism.
Experts live on the sparse mesh of axes ``expert_replica`` x ``expert``. Both are ``DeviceMesh`` objects over
all ranks, so tensor, pipeline and context parallelism, or torch FSDP2, would add axes here and leave the
modules alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fairseq_moe.distributed.all_to_all import GroupExchange
from fairseq_moe.modules.dispatch.exchange import Exchange, LocalExchange
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import Placement

__all__ = [
    "ParallelMesh",
    "data_parallel_size",
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


def data_parallel_size() -> int:
    """Count the ranks that take turns with the batches: all of them, while ``data`` is the only dense axis."""
    return world_size()


@contextmanager
def local_experts_only() -> Iterator[None]:
    """Let models that are built or loaded inside hold every expert and never communicate (generation, hub loading)."""
    token = _LOCAL_ONLY.set(True)
    try:
        yield
    finally:
        _LOCAL_ONLY.reset(token)


@dataclass(frozen=True, kw_only=True)
class ParallelMesh:
    """Holds the process groups of one expert layout.

    Args:
        layout: who owns which expert.
        rank: this process.
        dense: mesh of axis ``data``; None in a single process.
        sparse: mesh of axes ``expert_replica`` and ``expert``; None in a single process.
    """

    layout: ExpertLayout
    rank: int
    dense: DeviceMesh | None
    sparse: DeviceMesh | None

    def group_of_copies(self, placement: Placement) -> dist.ProcessGroup | None:
        """Give the group of ranks that hold the same part of such a parameter; None in a single process."""
        (axis,) = placement.copied_over
        for mesh in (self.dense, self.sparse):
            if mesh is not None and axis in (mesh.mesh_dim_names or ()):
                return mesh.get_group(axis)
        return None

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """List every process group of the two meshes; none in a single process."""
        meshes = [mesh for mesh in (self.dense, self.sparse) if mesh is not None]
        return [group for mesh in meshes for group in mesh.get_all_groups()]

    def exchange(self) -> Exchange:
        """Make the token exchange of this rank's expert group; local when the group has one rank."""
        if self.sparse is None or self.layout.ep_size == 1:
            return LocalExchange()
        return GroupExchange(self.sparse.get_group("expert"))


_MESHES: dict[tuple[dist.ProcessGroup, ExpertLayout], ParallelMesh] = {}


def parallel_mesh(num_experts: int, ep_size: int | None = None) -> ParallelMesh:
    """Make, or find, the mesh for ``num_experts`` over the current ranks; a process group's first call is collective.

    Raises:
        ConfigError: the experts do not divide over the ranks.
    """
    layout = ExpertLayout(num_experts=num_experts, world_size=world_size(), given_ep_size=ep_size)
    if world_size() == 1:
        return ParallelMesh(layout=layout, rank=0, dense=None, sparse=None)
    world = dist.group.WORLD
    assert world is not None
    key = (world, layout)
    if key not in _MESHES:
        for stale in [k for k in _MESHES if k[0] is not world]:
            del _MESHES[stale]
        device = "cuda" if dist.get_backend() == "nccl" and torch.cuda.is_available() else "cpu"
        grid = (layout.num_replicas, layout.ep_size)
        _MESHES[key] = ParallelMesh(
            layout=layout,
            rank=rank(),
            dense=init_device_mesh(device, (layout.world_size,), mesh_dim_names=("data",)),
            sparse=init_device_mesh(device, grid, mesh_dim_names=("expert_replica", "expert")),
        )
    return _MESHES[key]
