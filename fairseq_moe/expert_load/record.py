"""The load of every expert of every layer, written while a model trains and is validated.

One JSON object per line is appended to ``moe_load.jsonl`` in the save directory:

    {"version": 1, "split": "train", "update": 200, "layers": [1, 3],
     "wanted": [[...E counts...], ...], "kept": [[...], ...]}

``wanted`` counts the assignments that asked for a place at an expert since the last record of that split,
``kept`` those that got one, both summed over ranks and micro-batches; ``layers`` are decoder layers from 0.
A run that goes on from an older checkpoint appends updates that the file has already: the later line counts.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from fairseq_moe.errors import MoEError

__all__ = ["LOAD_KEY", "RECORD_NAME", "LoadRecord", "append_record", "read_records", "readable_records"]

# Logging key of the summed (layers, 2, E) loads; the underscore hides it from progress bars.
LOAD_KEY = "_moe_expert_load"
RECORD_NAME = "moe_load.jsonl"
_VERSION = 1
_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LoadRecord:
    """Holds one line of the record: the load of every layer in one update; see the module for the fields."""

    split: str
    update: int
    layers: list[int]
    wanted: list[list[int]]
    kept: list[list[int]]

    def __post_init__(self) -> None:
        widths = {len(counts) for counts in (*self.wanted, *self.kept)}
        if not (len(self.layers) == len(self.wanted) == len(self.kept) > 0 and len(widths) == 1):
            raise ValueError("a load record needs one list of counts per layer, all of one length")

    @classmethod
    def from_load(cls, load: Tensor, *, split: str, update: int, layers: Sequence[int]) -> "LoadRecord":
        """Build a record from a summed float (layers, 2, E) tensor."""
        counts = load.round().long().tolist()
        return cls(
            split=split,
            update=update,
            layers=list(layers),
            wanted=[layer[0] for layer in counts],
            kept=[layer[1] for layer in counts],
        )


def append_record(directory: str | Path, record: LoadRecord) -> None:
    """Append one line to the directory's record; what a killed job left unfinished is cut off first."""
    path = Path(directory) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"version": _VERSION, **asdict(record)}) + "\n"
    with path.open("ab+") as file:
        file.truncate(_end_of_last_line(file))
        file.write(line.encode())


def _end_of_last_line(file: BinaryIO) -> int:
    """Find the position after the last newline; 0 without one."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(end - _BLOCK, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read_records(path: str | Path) -> Iterator[LoadRecord]:
    """Read the records of a file or of a save directory, in order; an unfinished last line is left out.

    Raises:
        MoEError: no record there, or a line that is not one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD_NAME
    if not path.is_file():
        raise MoEError(f"no load record at {path}; train with --criterion moe_cross_entropy to get one.")
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        yield _parse(line, where=f"{path} line {number}")


def readable_records(path: Path) -> Iterator[LoadRecord | None]:
    """Read the records of a file that may be damaged, in order; None for each line that cannot be read."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield _parse(line, where=str(path))
            except MoEError:
                yield None


def _parse(line: str, *, where: str) -> LoadRecord:
    damaged = MoEError(f"{where} is not a load record; delete that line.")
    try:
        fields = json.loads(line)
        version = fields.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise damaged from None
    if version != _VERSION:
        raise MoEError(f"{where} has version {version}, expected {_VERSION}; update fairseq_moe.")
    try:
        return LoadRecord(**fields)
    except (ValueError, TypeError):
        raise damaged from None
