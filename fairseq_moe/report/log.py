"""Read fairseq's log: the numbers of its JSON lines, which updates were skipped, and whether training has ended.

A line is a JSON object (``--log-file``), or has one behind ``| train_inner |`` (the output of a rank). What
``train_inner`` says has plain names, what is said of an epoch or a validation has names that begin with the split. A
line that looks like one and cannot be read is counted: a killed job leaves such, and ranks that write into one file do.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Log", "Point", "read_log"]

_UPDATES = "num_updates"
_OBJECT = re.compile(r'(?:^|\| )(\{".*)')
_SKIPPED = "NOTE: gradient overflow detected, ignoring gradient"  # stock's words, for our skipped updates too
_ENDED = "done training in"
_OUTPUT = re.compile(r"\| (?:INFO|WARNING) \| ")  # a line that is not in stock's --log-file


@dataclass(frozen=True, kw_only=True)
class Point:
    """Hold the numbers of one line.

    Args:
        update: number of updates done.
        values: by name, without the split's; some may not be finite.
    """

    update: int
    values: dict[str, float]


@dataclass(kw_only=True)
class Log:
    """Hold what logs say, in order of updates; where a run went back, what came later.

    Args:
        train: each --log-interval.
        splits: of each epoch (``train``) and validation (by subset).
        skipped: number of updates done before each one that was skipped.
        has_output: ranks' output was among the files, which alone tells of skipped updates.
        has_ended: training has ended as it should.
        num_damaged: lines that could not be read, by file.
    """

    train: list[Point] = field(default_factory=list)
    splits: dict[str, list[Point]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    has_output: bool = False
    has_ended: bool = False
    num_damaged: dict[Path, int] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Tell whether there is no number at all."""
        return not self.train and not any(self.splits.values())

    @property
    def validations(self) -> dict[str, list[Point]]:
        """Get the points of each subset that was validated."""
        return {name: points for name, points in self.splits.items() if name != "train"}


def read_log(paths: Iterable[Path]) -> Log:
    """Read logs of one run, the oldest first; files that hold the same lines count once."""
    log = Log()
    for path in paths:
        _read_file(path, log)
    return log


def _read_file(path: Path, log: Log) -> None:
    update, skipped, damaged = 0, [], 0
    for line in _lines(path):
        found = _OBJECT.search(line)
        if found is not None:
            record = _parsed(found[1])
            if record is None:
                damaged += 1
                continue
            update = _note(record, log) or update
        log.has_output |= _OUTPUT.search(line) is not None
        if _SKIPPED in line:
            skipped.append(update)
        if _ENDED in line:
            log.has_ended = True
    if damaged:
        log.num_damaged[path] = damaged
    if skipped:  # what an earlier file says of the same updates is the same, or was taken back
        log.skipped = [each for each in log.skipped if each < skipped[0]] + skipped


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:  # it was there a moment ago
        return


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _note(record: dict[str, Any], log: Log) -> int | None:
    """Add a record to the log; returns the number of updates done, None where it says none."""
    name = next((key for key in record if key == _UPDATES or key.endswith(f"_{_UPDATES}")), None)
    done = None if name is None else _number(record[name])
    if name is None or done is None or not math.isfinite(done):
        return None
    split = name.removesuffix(_UPDATES)
    values = {
        key.removeprefix(split): number
        for key, value in record.items()
        if key.startswith(split) and (number := _number(value)) is not None
    }
    points = log.splits.setdefault(split[:-1], []) if split else log.train
    while points and points[-1].update >= done:
        points.pop()
    points.append(Point(update=int(done), values=values))
    if not split:
        log.has_ended = False  # a run that was continued
    return int(done)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
