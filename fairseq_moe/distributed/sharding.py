"""Process groups and collectives of sharded parameters (FSDP); gather and reduce-scatter of single tensors."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_gather_flat",
    "all_gather_single",
    "all_gather_stacked",
    "gather_base",
    "is_nccl_group",
    "one_rank_group",
    "reduce_scatter_base",
    "reduce_scatter_single",
]

# torch 2.13 has new names for these two.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


def all_gather_single(output: Tensor, rows: Tensor, **options: Any) -> Any:
    """Gather every rank's ``rows`` into ``output``, end to end; options and result are those of torch's function."""
    return getattr(dist, _ALL_GATHER)(output, rows, **options)


def reduce_scatter_single(output: Tensor, rows: Tensor, **options: Any) -> Any:
    """Sum ``rows`` over ranks, and keep this rank's share in ``output``; options and result are those of torch's."""
    return getattr(dist, _REDUCE_SCATTER)(output, rows, **options)


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
    all_gather_single(full, shard.contiguous(), group=group)
    return full


def all_gather_stacked(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather every rank's ``tensor``, of one shape on all of them, in fresh memory: (ranks of the group, ...)."""
    flat = all_gather_flat(tensor.reshape(-1), group)
    return flat.view(dist.get_world_size(group), *tensor.shape)


def gather_base(output: Tensor, shard: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Gather every rank's ``shard`` into ``output``: ``torch.distributed._all_gather_base`` by public functions."""
    all_gather_single(output, shard, group=group)


def reduce_scatter_base(output: Tensor, stacked: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sum over ranks, and keep this rank's share: ``torch.distributed._reduce_scatter_base``, flat as gloo insists.

    Args:
        output: (N,), this rank's share of the sum.
        stacked: (ranks, N) or (ranks * N,).
        group: the ranks that take part.
    """
    reduce_scatter_single(output, stacked.reshape(-1), group=group)
