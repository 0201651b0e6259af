"""The process that has spawned the ranks of one command: it passes signals on, and ends when they have ended."""

import os
import signal
import sys
import time
from multiprocessing import connection
from types import FrameType
from typing import Any

from fairseq_moe.stock.start.ending import USER_ERROR_EXIT_CODE

__all__ = ["wait_for"]

# What the other ranks get, after one has failed, to find out which and to say so.
_GRACE_SEC = 13.0


def wait_for(ranks: Any) -> None:
    """Wait for all ranks; when one fails, end those that do not end by themselves, and exit as it did.

    The ranks have said what happened, so there is no traceback of this process.

    Args:
        ranks: the ``ProcessContext`` of ``torch.multiprocessing.spawn``.

    Raises:
        SystemExit: a rank has failed.
    """
    processes = list(ranks.processes)

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    while True:
        # Asked once: a rank that ends between two questions would be neither failed nor waited for.
        running = [process for process in processes if process.exitcode is None]
        failed = next((p for p in processes if p not in running and p.exitcode != 0), None)
        if failed is not None or not running:
            break
        connection.wait([process.sentinel for process in running])
    if failed is None:
        return
    has_spoken = failed.exitcode == USER_ERROR_EXIT_CODE  # for all of them
    deadline = time.monotonic() + (0.0 if has_spoken else _GRACE_SEC)
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    _exit_as(processes.index(failed), failed.exitcode)


def _exit_as(rank: int, code: int) -> None:
    if code < 0:
        name = signal.Signals(-code).name
        print(f"fairseq_moe: error: rank {rank} was ended by {name}.", file=sys.stderr, flush=True)
        sys.exit(128 - code)
    sys.exit(code)
