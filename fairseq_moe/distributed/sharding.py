"""Process groups and collectives of sharded parameters (FSDP)."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_flat", "gather_base", "is_nccl_group", "one_rank_group", "reduce_scatter_base"]

# torch 2.13 has new names for these two.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def one_rank_group() -> dist.ProcessGroup:
    """Initialise torch.distributed, without any address, in a process that was started alone; return its world.

    ``world_size`` stays 1 and nothing that asks it communicates.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    return world


def is_nccl_group(group: dist.ProcessGroup) -> bool:
    """Tell whether ``group`` speaks NCCL only, that is, whether its ranks compute on GPUs."""
    return dist.get_backend(group) == "nccl"


def all_gather_flat(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather every rank's ``shard``, end to end, in fresh memory.

    Args:
        shard: (N,), the same N on every rank of ``group``.
        group: the ranks that hold the shards.

    Returns:
        (ranks of the group * N,), on every rank.
    """
    full = shard.new_empty(dist.get_world_size(group) * shard.numel())
    _all_gather(full, shard.contiguous(), group=group)
    return full


def gather_base(output: Tensor, shard: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Gather every rank's ``shard`` into ``output``: ``torch.distributed._all_gather_base`` by public functions."""
    _all_gather(output, shard, group=group)


def reduce_scatter_base(output: Tensor, stacked: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sum over ranks, and keep this rank's share: ``torch.distributed._reduce_scatter_base``, flat as gloo insists.

    Args:
        output: (N,), this rank's share of the sum.
        stacked: (ranks, N) or (ranks * N,).
        group: the ranks that take part.
    """
    _reduce_scatter(output, stacked.reshape(-1), group=group)
