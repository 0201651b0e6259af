"""One rank's shard of a checkpoint, and how all ranks learn whether the whole set has been written.

A save that fails on any rank has failed on all of them, with the same sentence, and its files are removed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fairseq_moe.checkpoint import SetId, ShardContent, ShardEntry, remove_set, write_shard
from fairseq_moe.distributed import broadcast_value, gather_values, rank, world_size
from fairseq_moe.errors import CheckpointError
from fairseq_moe.faults import fault
from fairseq_moe.stock.checkpoint.background import ShardOutcome

__all__ = [
    "Done",
    "Request",
    "SaveError",
    "agree_on_commit",
    "agree_on_shards",
    "commit_together",
    "write_share",
]


class SaveError(CheckpointError):
    """All ranks know that this checkpoint could not be written, and why."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Rank 0's word to the others: write a set."""

    directory: Path
    set_id: SetId
    in_background: bool


@dataclass(frozen=True, kw_only=True)
class Done:
    """Rank 0's last word in a save."""

    failure: str | None


def write_share(content: ShardContent, request: Request) -> ShardOutcome:
    """Write this rank's shard; returns its entry, or why there is none."""
    fault("save.after_snapshot")
    try:
        entry = write_shard(
            request.directory, request.set_id, index=rank(), num_shards=world_size(), content=content
        )
        fault("save.after_shard")
    except (OSError, CheckpointError) as error:
        return None, f"rank {rank()} could not write its shard ({error})"
    return entry, None


def agree_on_shards(outcome: ShardOutcome, request: Request) -> list[ShardEntry]:
    """Agree with all ranks that all shards are written, and give their entries.

    Raises:
        SaveError: on every rank, if any could not be written; then the whole set is gone.
    """
    written = gather_values(outcome)
    _raise_if_any([failure for _, failure in written], request)
    fault("save.agreed")
    return [entry for entry, _ in written]


def commit_together(
    path: Path,
    request: Request,
    commit: Callable[[list[ShardEntry]], None],
    entries: list[ShardEntry],
) -> None:
    """Write the main file, on rank 0, and tell the others how that went."""
    failure = None
    try:
        commit(entries)
    except OSError as error:
        failure = f"rank 0 could not write {path} ({error})"
    agree_on_commit(failure, request)


def agree_on_commit(failure: str | None, request: Request | None = None) -> None:
    """Learn on all ranks whether rank 0 has written the main file."""
    _raise_if_any([broadcast_value(failure)], request)
    fault("save.committed")


def _raise_if_any(failures: list[str | None], request: Request | None) -> None:
    found = [failure for failure in failures if failure is not None]
    if found:
        if rank() == 0 and request is not None:
            remove_set(request.directory, request.set_id)
        raise SaveError("; ".join(found), agreed=True)
