"""--save-in-background: checkpoints are written while training goes on.

A save then takes three steps. At the save, each rank copies its share and starts a thread that writes it as a
shard; rank 0 keeps what the main file will say, and the further names that stock asks for. At each update the
ranks tell each other, on the all-reduce of the gradient norm, whether their threads have ended (``StepGuard``).
At the first update at which all have, or when the next save or the end of the run comes first, they agree on
the outcome, and rank 0 commits the main file and copies it. Until then the checkpoint does not exist, and a
kill costs it alone.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq_moe.checkpoint import ShardEntry

__all__ = ["BackgroundSave", "Commit", "ShardOutcome"]

# The entry of a shard, or why there is none.
ShardOutcome = tuple[ShardEntry | None, str | None]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Say what rank 0 does when all shards are written.

    Args:
        main: writes the main file from all entries.
        copies: its further names.
        noted: what stock remembers of the best score if the save fails.
    """

    main: Callable[[list[ShardEntry]], None]
    path: Path
    copies: list[Path] = field(default_factory=list)
    noted: dict[str, Any] = field(default_factory=dict)


class BackgroundSave:
    """Write one rank's shard of a checkpoint in a thread, which begins at once.

    Args:
        request: what rank 0 has asked for.
        write: writes the shard.
        commit: rank 0 only.
    """

    def __init__(self, *, request: Any, write: Callable[[], ShardOutcome], commit: Commit | None) -> None:
        self.request = request
        self.commit = commit
        self._write = write
        self._outcome: ShardOutcome | Exception | None = None
        self._thread = threading.Thread(target=self._run, name="shard writer")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._write()
        except Exception as error:  # told to whoever asks for the outcome
            self._outcome = error

    @property
    def is_done(self) -> bool:
        """Tell whether the shard is written, or has failed, so that ``outcome`` needs no waiting."""
        return not self._thread.is_alive()

    def outcome(self) -> ShardOutcome:
        """Wait for the shard and give its entry, or why there is none."""
        self._thread.join()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome
