"""Let ranks that end with the same error leave together, by a store and not by a collective.

A rank that leaves while another is still connecting to it (a new process group is there on one rank before it is on
the other) resets that connection, and the other rank ends with a stack trace in place of the sentence.
"""

import time
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["leave_together"]

_POLL_SEC = 0.05


def leave_together(timeout_sec: float) -> None:
    """Wait until every rank has called this, or the deadline is over.

    Args:
        timeout_sec: how long to wait for ranks that never come.
    """
    if not hasattr(distributed_c10d, "_get_default_store"):
        time.sleep(timeout_sec)
        return
    deadline = time.monotonic() + timeout_sec
    try:
        default: Any = distributed_c10d._get_default_store()
        store = distributed_c10d.PrefixStore("fairseq_moe_leaving", default.clone())
        store.set(f"rank/{dist.get_rank()}", "")
        everyone = [f"rank/{r}" for r in range(dist.get_world_size())]
        while not store.check(everyone):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_SEC)
    except (RuntimeError, OSError):
        return  # the store is gone, and with it the rank that kept it
