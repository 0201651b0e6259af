"""Find what a run has written: in a launcher's run directory, or in a plain --save-dir of fairseq with its logs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq_moe.errors import MoEError
from fairseq_moe.expert_load.record import RECORD_NAME

__all__ = ["RunFiles", "find_files", "read_json", "read_text"]

_LOG_ENDINGS = (".log", ".jsonl", ".json", ".out", ".err", ".txt")
_NOT_LOGS = (
    RECORD_NAME,
    "plan.json",
    "plan.txt",
    "measured.json",
    "versions.json",
    "origins.txt",
    "dict.txt",
)
_LAUNCHERS_LOG = "train.jsonl"
_MAX_TEXT_BYTES = 200_000


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """List the files of a run that a report reads; None and empty where there are none.

    Args:
        run_dir: where the page goes.
        logs: with fairseq's JSON lines, or the output of ranks; the oldest first.
        numbers: those of them whose numbers count.
        load: ``moe_load.jsonl``.
        plan: ``plan.json``.
        measured: ``measured.json``.
        texts: further ones to show as they are.
        traces: of profilers.
    """

    run_dir: Path
    logs: list[Path] = field(default_factory=list)
    numbers: list[Path] = field(default_factory=list)
    load: Path | None = None
    plan: Path | None = None
    measured: Path | None = None
    texts: list[Path] = field(default_factory=list)
    traces: list[Path] = field(default_factory=list)

    def changed_at_sec(self) -> float:
        """Return when any of them changed last, in seconds since the epoch; 0 without any."""
        files = [*self.logs, *(path for path in (self.load, self.plan, self.measured) if path is not None)]
        return max((_changed_at_sec(path) for path in files), default=0.0)


def find_files(run_dir: Path, logs: Sequence[Path] = ()) -> RunFiles:
    """Find the files of a run.

    Args:
        run_dir: a run directory, or a --save-dir.
        logs: files that hold the log; none: those in the directory and in its ``logs/``.

    Raises:
        MoEError: the directory, or a log that is named, is not there.
    """
    if not run_dir.is_dir():
        raise MoEError(f"{run_dir} is not a directory; name a run's directory, or a --save-dir.")
    missing = [str(path) for path in logs if not path.is_file()]
    if missing:
        raise MoEError(f"no log at {', '.join(missing)}; name what --log-file was given, or leave out --log.")
    found = list(logs) or [
        path
        for folder in (run_dir, run_dir / "logs")
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _LOG_ENDINGS and path.name not in _NOT_LOGS
    ]
    found.sort(key=lambda path: (_changed_at_sec(path), path.name))
    of_launcher = [
        path for path in found if path.name == _LAUNCHERS_LOG
    ]  # it has all that the ranks' output has
    folders = [run_dir / "profile", run_dir / "checkpoints" / "profile"]
    return RunFiles(
        run_dir=run_dir,
        logs=found,
        numbers=of_launcher or found,
        load=_first(run_dir / "checkpoints" / RECORD_NAME, run_dir / RECORD_NAME),
        plan=_first(run_dir / "plan.json"),
        measured=_first(run_dir / "measured.json"),
        texts=[path for path in (run_dir / "command.sh", run_dir / "plan.txt") if path.is_file()],
        traces=sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir()),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds one JSON object; None where it is damaged or only half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_text(path: Path) -> str:
    """Read the beginning of a text file, and say where it goes on."""
    with path.open("rb") as file:
        data = file.read(_MAX_TEXT_BYTES + 1)
    text = data[:_MAX_TEXT_BYTES].decode(errors="replace")
    return text if len(data) <= _MAX_TEXT_BYTES else f"{text}\n... (the file goes on)"


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _changed_at_sec(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it was there a moment ago
        return 0.0
