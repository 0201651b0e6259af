"""How long a collective may wait for the other ranks."""

import datetime
from collections.abc import Iterable

import torch.distributed as dist
from torch.distributed import distributed_c10d

from fairseq_moe.distributed.mesh import world_size

__all__ = ["set_collective_timeout"]


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
