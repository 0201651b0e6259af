"""Say what came of a run, beside what was planned: ``python -m fairseq_moe.launch.measured RUN_DIR``."""

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.launch.run_directory import write_text

__all__ = ["main", "write_measured"]

_RECORD = re.compile(r"\{.*\}")
_GIB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``measured.json``; the exit code is 0, or 2 after one sentence on stderr."""
    argv = sys.argv[1:] if arguments is None else arguments
    if len(argv) != 1:
        print("usage: python -m fairseq_moe.launch.measured RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(f"measured: {write_measured(Path(argv[0]))}")
    except MoEError as error:
        print(f"fairseq_moe.launch.measured: {error}", file=sys.stderr)
        return 2
    return 0


def write_measured(run_dir: Path) -> Path:
    """Write ``measured.json`` from the run's log: words per second, updates, peak memory, and the plan's numbers.

    Words per second are the median over records of training, without the first, in which everything is warmed up; peak
    memory is what rank 0 logs on a GPU, and null on CPUs.

    Raises:
        ConfigError: there is no log, or no update in it.
    """
    log = _log_of(run_dir)
    records = list(_records(log))
    if not records:
        raise ConfigError([f"{log} holds no record of an update; train with --log-format json."])
    gib = [
        float(record["cuda_gb_allocated"])
        for record in records
        if _is_number(record.get("cuda_gb_allocated"))
    ]
    speeds = [float(record["wps"]) for record in records]
    measured = {
        "updates": max(int(record["num_updates"]) for record in records),
        "words_per_sec": statistics.median(speeds[1:] or speeds),
        "peak_bytes": round(max(gib) * _GIB) if gib else None,
        "planned": _planned(run_dir / "plan.json"),
    }
    path = run_dir / "measured.json"
    write_text(path, json.dumps(measured, indent=1) + "\n")
    return path


def _log_of(run_dir: Path) -> Path:
    """Find train.jsonl, or the newest log of a launcher where the run has no --log-file."""
    log = run_dir / "train.jsonl"
    if log.is_file():
        return log
    logs = sorted(run_dir.glob("logs/*.log"), key=lambda path: path.stat().st_mtime_ns)
    if not logs:
        raise ConfigError([f"{run_dir} has neither train.jsonl nor logs/*.log; name the directory of a run."])
    return logs[-1]


def _records(log: Path) -> Iterator[dict[str, Any]]:
    """Read what fairseq says after every --log-interval updates, among whatever else is in the log."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = _RECORD.search(line)
            try:
                record = json.loads(found[0]) if found else None
            except ValueError:
                continue
            if isinstance(record, dict) and all(
                _is_number(record.get(key)) for key in ("wps", "num_updates")
            ):
                yield record


def _is_number(value: Any) -> bool:
    """Tell whether a value is one that can be averaged: of a number that is not there, fairseq writes words."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _planned(path: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(plan, dict):
        return None
    return {key: plan.get(key) for key in ("words_per_sec", "step_sec", "peak_bytes")}


if __name__ == "__main__":
    sys.exit(main())
