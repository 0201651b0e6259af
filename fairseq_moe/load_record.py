"""The load of every expert of every layer, written while a model trains and is validated.

One JSON object per line is appended to ``moe_load.jsonl`` in the save directory:

    {"version": 1, "split": "train", "update": 200, "layers": [1, 3],
     "wanted": [[...E counts...], ...], "kept": [[...], ...]}

``wanted`` counts the assignments that asked for a place at an expert since the last record of that split,
``kept`` those that got one, both summed over ranks and micro-batches; ``layers`` are decoder layers from 0.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fairseq_moe.errors import MoEError

__all__ = ["LOAD_KEY", "RECORD_NAME", "LoadRecord", "append_record", "read_records"]

# Logging key of the summed (layers, 2, E) loads; the underscore hides it from progress bars.
LOAD_KEY = "_moe_expert_load"
RECORD_NAME = "moe_load.jsonl"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LoadRecord:
    """One line of the record; see the module's docstring."""

    split: str
    update: int
    layers: list[int]
    wanted: list[list[int]]
    kept: list[list[int]]

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
    """Append one line to the directory's record; a single write, so that lines of one job never mix."""
    path = Path(directory) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"version": _VERSION, **asdict(record)}) + "\n")


def read_records(path: str | Path) -> Iterator[LoadRecord]:
    """The records of a file or of a save directory, in order; a torn last line (a killed job) is left out.

    Raises:
        MoEError: no record there, or a line that is not one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD_NAME
    if not path.is_file():
        raise MoEError(f"no load record at {path}; train with --criterion moe_cross_entropy to get one.")
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            fields = json.loads(line)
            version = fields.pop("version")
            record = LoadRecord(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            if number == len(lines):
                return
            raise MoEError(f"{path} line {number} is not a load record; delete that line.") from None
        if version != _VERSION:
            raise MoEError(
                f"{path} line {number} has version {version}, expected {_VERSION}; update fairseq_moe."
            )
        yield record
