"""Read the load of the experts over a run, thinned out meanwhile: a long run of a large model writes gigabytes."""

from dataclasses import dataclass, field
from pathlib import Path

from fairseq_moe.expert_load.record import LoadRecord, readable_records

__all__ = ["MAX_RECORDS", "read_loads"]

MAX_RECORDS = 600


@dataclass(kw_only=True)
class _Thinned:
    """Hold every ``step``-th record of a split and the last one, in order of updates; the step grows as needed."""

    records: list[LoadRecord] = field(default_factory=list)
    last: LoadRecord | None = None
    step: int = 1
    num_seen: int = 0
    num_others: int = 0

    def add(self, record: LoadRecord) -> None:
        """Add a record, of the same layers as those before it or instead of them all; later updates are taken back."""
        if self.last is not None and _shape(record) != _shape(self.last):
            self.num_others += self.num_seen
            self.records, self.step, self.num_seen = [], 1, 0
        while self.records and self.records[-1].update >= record.update:
            self.records.pop()
        if self.num_seen % self.step == 0:
            self.records.append(record)
        self.last = record
        self.num_seen += 1
        if len(self.records) > MAX_RECORDS:
            self.records = self.records[::2]
            self.step *= 2

    def all(self) -> list[LoadRecord]:
        """List what is held."""
        assert self.last is not None
        return self.records if self.records and self.records[-1] is self.last else [*self.records, self.last]


def read_loads(path: Path) -> tuple[list[LoadRecord], list[str], int]:
    """Read the loads of training, or of validation where training wrote none.

    Returns:
        records of the layers that the last one has, in order of updates; what the reader should know of them, a
        sentence each; the number of lines that cannot be read.
    """
    splits: dict[str, _Thinned] = {}
    num_damaged = 0
    for record in readable_records(path):
        if record is None:
            num_damaged += 1
        else:
            splits.setdefault(record.split, _Thinned()).add(record)
    if not splits:
        return [], [], num_damaged
    split = "train" if "train" in splits else next(iter(splits))
    thinned, notes = splits[split], []
    if split != "train":
        notes.append("The loads are those of validation; none of training were written.")
    if thinned.num_others:
        notes.append(
            f"{thinned.num_others:,} earlier records of other layers or numbers of experts are left out."
        )
    if thinned.step > 1:
        notes.append(f"One record of {thinned.step} is shown, and the last one.")
    return thinned.all(), notes, num_damaged


def _shape(record: LoadRecord) -> tuple[int, ...]:
    return (*record.layers, len(record.wanted[0]))
