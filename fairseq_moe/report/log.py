"""Read fairseq's log: the numbers of its JSON lines, which updates were skipped, and whether training has ended.

A line is a JSON object (``--log-file``), or has one behind ``| train_inner |`` (the output of a rank). What
``train_inner`` says has plain names, what is said of an epoch or a validation has names that begin with the split. A
line that looks like one and cannot be read is counted: a killed job leaves such, and ranks that write into one file do.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
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


def read_log(paths: Sequence[Path], *, numbers: Collection[Path]) -> Log:
    """Read logs of one run, the oldest first; files that hold the same lines count once.

    Args:
        paths: of all files.
        numbers: those whose numbers count; of the others only what is said in words.
    """
    log, read = Log(), []
    for path in paths:
        found = _read_file(path)
        read.append(found)
        log.has_output |= found.has_output
        if found.skipped:  # what an earlier file says of the same updates is the same, or was taken back
            log.skipped = [each for each in log.skipped if each < found.skipped[0]] + found.skipped
        if path in numbers:
            log.train = _joined(log.train, found.train)
            for split, points in found.splits.items():
                log.splits[split] = _joined(log.splits.get(split, []), points)
            if found.num_damaged:
                log.num_damaged[path] = found.num_damaged
    last = max((found.update for found in read), default=0)
    log.has_ended = any(found.has_ended for found in read if found.update == last)
    return log


@dataclass(kw_only=True)
class _File:
    """Hold what one file says; ``update`` is the last that it tells of."""

    train: list[Point] = field(default_factory=list)
    splits: dict[str, list[Point]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    update: int = 0
    has_output: bool = False
    has_ended: bool = False
    num_damaged: int = 0


def _read_file(path: Path) -> _File:
    file = _File()
    for line in _lines(path):
        found = _OBJECT.search(line)
        if found is not None:
            record = _parsed(found[1])
            if record is None:
                file.num_damaged += 1
                continue
            _note(record, file)
        file.has_output |= _OUTPUT.search(line) is not None
        if _SKIPPED in line:
            file.skipped.append(file.update)
        file.has_ended |= _ENDED in line
    return file


def _joined(before: list[Point], after: list[Point]) -> list[Point]:
    """Put points behind those of earlier updates; the others were taken back, or are the same."""
    return [point for point in before if point.update < after[0].update] + after if after else before


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:  # it was there a moment ago
        return


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _note(record: dict[str, Any], file: _File) -> None:
    """Add a record to what a file says; one without a number of updates is about something else."""
    name = next((key for key in record if key == _UPDATES or key.endswith(f"_{_UPDATES}")), None)
    done = None if name is None else _number(record[name])
    if name is None or done is None or not math.isfinite(done):
        return
    split = name.removesuffix(_UPDATES)
    values = {
        key.removeprefix(split): number
        for key, value in record.items()
        if key.startswith(split) and (number := _number(value)) is not None
    }
    points = file.splits.setdefault(split[:-1], []) if split else file.train
    while points and points[-1].update >= done:
        points.pop()
    points.append(Point(update=int(done), values=values))
    if not split:
        file.has_ended = False  # a run that was continued
    file.update = int(done)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
