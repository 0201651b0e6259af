"""Inject a fault that a reliability test asks for: one named place in the code, one rank, one action.

``FAIRSEQ_MOE_FAULT="save.main_half@0=kill"`` kills rank 0 when it has written half of a main file.
``point@rank@nth=action`` waits for the nth time that the rank comes by (from 1). Without the variable,
``fault`` looks at the environment and returns.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fairseq_moe.errors import ConfigError

__all__ = ["ACTIONS", "POINTS", "VARIABLE", "InjectedError", "ask_rank", "fault"]

VARIABLE = "FAIRSEQ_MOE_FAULT"

# Every place at which the code calls ``fault``, and where that is. A test compares this table with the code.
POINTS: dict[str, str] = {
    "save.begin": "every rank knows that a checkpoint is wanted",
    "save.background_begun": "with --save-in-background: the rank goes on, its shard is being written",
    "save.after_snapshot": "this rank's tensors are collected",
    "save.shard_opened": "the temporary file of this rank's shard is there, empty",
    "save.shard_half": "half of its bytes are written",
    "save.shard_written": "all bytes are written, none flushed",
    "save.shard_flushed": "the bytes are on disk, under the temporary name",
    "save.shard_renamed": "the shard has its name",
    "save.after_shard": "the directory entry of the shard is on disk",
    "save.agreed": "all ranks know that all shards are written",
    "save.main_opened": "rank 0: the temporary main file is there, empty",
    "save.main_half": "half of its bytes are written",
    "save.main_written": "all bytes are written, none flushed",
    "save.main_flushed": "the bytes are on disk, under the temporary name",
    "save.main_renamed": "the main file has its name: the checkpoint is complete",
    "save.committed": "all ranks know that the checkpoint is complete",
    "save.copy_opened": "rank 0: the temporary copy (checkpoint_last.pt, ...) is there, empty",
    "save.copy_half": "half of its bytes are written",
    "save.copy_written": "all bytes are written, none flushed",
    "save.copy_flushed": "the bytes are on disk, under the temporary name",
    "save.copy_renamed": "the copy has its name",
    "save.part_opened": "of preprocess: the temporary file of a piece of text is there, empty",
    "save.part_half": "half of its bytes are written",
    "save.part_written": "all bytes are written, none flushed",
    "save.part_flushed": "the bytes are on disk, under the temporary name",
    "save.part_renamed": "the piece has its name, and the process that waits for it does not know",
    "save.part_known": "that process knows",
    "save.before_prune": "rank 0: stock has deleted old main files, their shards are still there",
    "save.pruned_one": "one old set of shards is deleted",
    "save.end": "the rank goes back to training",
    "train.forward": "before each training micro-batch",
    "valid.forward": "before each validation batch",
}

ACTIONS = {
    "kill": "SIGKILL to itself",
    "stop": "SIGSTOP to itself: alive, and silent",
    "raise": "InjectedError",
    "enospc": "OSError: no space left on device",
    "oom": "torch.OutOfMemoryError",
    "sleep:SECONDS": "sleeps",
}


class InjectedError(RuntimeError):
    """Raised by the action ``raise`` of a fault."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    point: str
    rank: int
    nth: int
    action: str


_counts: dict[str, int] = {}
_rank_of_process: Callable[[], int] = int  # until the adapter says: rank 0


def ask_rank(rank: Callable[[], int]) -> None:
    """Let ``fault`` learn this process's rank by calling ``rank``; the adapter says how, once."""
    global _rank_of_process
    _rank_of_process = rank


def fault(point: str) -> None:
    """Fail here as ``FAIRSEQ_MOE_FAULT`` asks, if it names this place; else do nothing.

    Args:
        point: one of ``POINTS``.

    Raises:
        ConfigError: the variable names no known point or action.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    wanted = _parse(text)
    if wanted.point != point or wanted.rank != _rank_of_process():
        return
    _counts[text] = _counts.get(text, 0) + 1
    if _counts[text] == wanted.nth:
        _act(wanted)


def _parse(text: str) -> _Wanted:
    where, _, action = text.partition("=")
    point, *numbers = where.split("@")
    known = action in ACTIONS or (action.startswith("sleep:") and _is_number(action[len("sleep:") :]))
    if point not in POINTS or not known or len(numbers) not in (1, 2) or not all(map(str.isdigit, numbers)):
        raise ConfigError(
            [
                f"{VARIABLE} is {text!r}, expected point@rank=action or point@rank@nth=action with one of the "
                f"points {', '.join(POINTS)} and one of the actions {', '.join(ACTIONS)}."
            ]
        )
    return _Wanted(point=point, rank=int(numbers[0]), nth=int([*numbers, "1"][1]), action=action)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _act(wanted: _Wanted) -> None:
    match wanted.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise InjectedError(f"injected at {wanted.point}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "oom":
            raise torch.OutOfMemoryError(f"out of memory (injected at {wanted.point})")
        case _:
            time.sleep(float(wanted.action.removeprefix("sleep:")))
