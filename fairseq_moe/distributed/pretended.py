"""Be one rank of a run whose other ranks are not there: to build what it would hold, on a machine of any size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["pretended_rank"]


@contextmanager
def pretended_rank(rank: int, num_ranks: int) -> Iterator[None]:
    """Let code inside see a process group of so many ranks, whose collectives do nothing.

    Args:
        rank: which of them this process is.
        num_ranks: how many there seem to be.

    Raises:
        RuntimeError: this process has a process group.
    """
    # Of torch's tests, and part of every torch: a backend that says yes to everything.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process has a process group, expected none.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
