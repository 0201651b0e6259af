"""Small collectives of the control path. In a single process each is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_moe.distributed.mesh import rank, world_size

__all__ = ["agree", "all_reduce_sum", "barrier", "broadcast_value", "gather_values"]


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum ``tensor`` over ``group`` (None: all ranks), in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def broadcast_value(value: Any) -> Any:
    """Rank 0's ``value`` on every rank. Values come from our own rank 0, so unpickling them adds no trust."""
    if world_size() == 1:
        return value
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, device=_control_device())
    return box[0]


def gather_values(value: Any) -> list[Any]:
    """Every rank's ``value``, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree(failure: str | None) -> list[str]:
    """The failures of all ranks, in rank order, on every rank; empty when no rank failed."""
    return [failure for failure in gather_values(failure) if failure is not None]


def _control_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
