"""The one door to torch.distributed: process groups, the expert exchange and a few agreed reductions."""

from fairseq_moe.distributed.collectives import (
    agree,
    all_reduce_sum,
    barrier,
    broadcast_value,
    gather_values,
)
from fairseq_moe.distributed.exchange import GroupExchange
from fairseq_moe.distributed.mesh import ParallelMesh, local_experts_only, parallel_mesh, rank, world_size

__all__ = [
    "GroupExchange",
    "ParallelMesh",
    "agree",
    "all_reduce_sum",
    "barrier",
    "broadcast_value",
    "gather_values",
    "local_experts_only",
    "parallel_mesh",
    "rank",
    "world_size",
]
