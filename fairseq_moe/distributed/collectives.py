"""Small collectives of the control path, and how long any may wait. In a single process each is the identity."""

import datetime
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from fairseq_moe.distributed.mesh import rank, world_size

__all__ = [
    "agree",
    "all_reduce_sum",
    "barrier",
    "broadcast_value",
    "collective_timeout",
    "gather_values",
    "set_collective_timeout",
]


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum ``tensor`` over ``group`` (None: all ranks), in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_value(
    value: Any, *, src: int = 0, group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> Any:
    """Send ``value`` of rank ``src`` to every rank of ``group`` (None: all ranks), by way of ``device``.

    Values come from our own rank, so unpickling them adds no trust.
    """
    if world_size() == 1:
        return value
    box = [value if rank() == src else None]
    dist.broadcast_object_list(box, src=src, group=group, device=device or _control_device())
    return box[0]


def gather_values(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather ``value`` of every rank of ``group`` (None: all ranks), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(failure: str | None) -> list[str]:
    """Gather the failures of all ranks, in rank order, on every rank; empty when no rank failed."""
    return [failure for failure in gather_values(failure) if failure is not None]


def set_collective_timeout(seconds: float, groups: Iterable[dist.ProcessGroup | None] = ()) -> None:
    """Let collectives of the world and of ``groups`` fail after ``seconds``.

    torch has no public function for groups that exist already; without its private one their timeouts stay
    as they are (30 minutes for gloo, 10 for NCCL).
    """
    if world_size() == 1 or not hasattr(distributed_c10d, "_set_pg_timeout"):
        return
    timeout = datetime.timedelta(seconds=seconds)
    for group in {group for group in (dist.group.WORLD, *groups) if group is not None}:
        distributed_c10d._set_pg_timeout(timeout, group)


def collective_timeout() -> datetime.timedelta:
    """Tell how long gloo's collectives of the world wait."""
    # The same private side of torch as above; a longer wait is what there is without it.
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return getattr(backend.options, "_timeout", dist.default_pg_timeout)  # type: ignore[no-any-return]


def _control_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
