"""Shares, drops, dead and overloaded experts of each layer of a load record: arithmetic on counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fairseq_moe.errors import MoEError
from fairseq_moe.expert_load.record import LoadRecord

__all__ = ["LayerLoad", "history", "layer_loads", "select", "warnings_of"]


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """Load of one layer's experts in one record.

    Args:
        layer: decoder layer, from 0.
        wanted: assignments that asked for each expert.
        kept: those that got a place.
    """

    layer: int
    wanted: Sequence[int]
    kept: Sequence[int]

    @property
    def shares(self) -> list[float]:
        """Each expert's share of the layer's assignments, 0..1; all 0 when there were none."""
        total = sum(self.wanted)
        return [count / total if total else 0.0 for count in self.wanted]

    @property
    def ratios(self) -> list[float]:
        """Each expert's load divided by the mean load: 1 is balanced."""
        return [share * len(self.wanted) for share in self.shares]

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert divided by the mean load."""
        return max(self.ratios)

    @property
    def drop_frac(self) -> float:
        """Share of the assignments that found no place, 0..1."""
        total = sum(self.wanted)
        return 1 - sum(self.kept) / total if total else 0.0

    @property
    def dead(self) -> list[int]:
        """Experts that no token asked for; none when the layer saw no tokens."""
        if not any(self.wanted):
            return []
        return [expert for expert, count in enumerate(self.wanted) if count == 0]

    def overloaded(self, threshold: float) -> list[int]:
        """Experts with more than ``threshold`` times the mean load."""
        return [expert for expert, ratio in enumerate(self.ratios) if ratio > threshold]


def layer_loads(record: LoadRecord) -> list[LayerLoad]:
    """List the loads of a record's layers, from the bottom of the model up."""
    return [
        LayerLoad(layer=layer, wanted=wanted, kept=kept)
        for layer, wanted, kept in zip(record.layers, record.wanted, record.kept, strict=True)
    ]


def history(records: Iterable[LoadRecord], *, split: str) -> list[LoadRecord]:
    """List a split's records in order of updates; where a run went back, the later lines count."""
    kept: list[LoadRecord] = []
    for record in records:
        if record.split == split:
            while kept and kept[-1].update >= record.update:
                kept.pop()
            kept.append(record)
    return kept


def select(records: Sequence[LoadRecord], *, split: str | None, update: int | None, where: str) -> LoadRecord:
    """Choose the record to show.

    Args:
        records: all that the file holds, in order.
        split: ``train`` or ``valid``; None: ``valid`` if there is one, else what there is.
        update: number of the update; None: the last one.
        where: the file, for messages.

    Raises:
        MoEError: nothing fits; the message says what there is.
    """
    if not records:
        raise MoEError(f"{where} holds no record yet; the first one comes after --log-interval updates.")
    splits = sorted({record.split for record in records})
    if split is None:
        split = "valid" if "valid" in splits else splits[0]
    chosen = history(records, split=split)
    if not chosen:
        raise MoEError(f"{where} has no record of split {split!r}, only of {', '.join(splits)}; choose one.")
    if update is None:
        return chosen[-1]
    for record in chosen:
        if record.update == update:
            return record
    nearest = min(chosen, key=lambda record: abs(record.update - update)).update
    raise MoEError(
        f"{where} has no {split} record of update {update}, but {len(chosen)} of updates {chosen[0].update} "
        f"to {chosen[-1].update}; the nearest is {nearest}."
    )


def warnings_of(loads: Sequence[LayerLoad], *, overloaded_above: float) -> list[str]:
    """Write one sentence per layer with dead experts, and one per layer with overloaded ones."""
    found = []
    for load in loads:
        if load.dead:
            found.append(f"layer {load.layer}: dead {_experts(load.dead)}, no token asked for a place there.")
        overloaded = load.overloaded(overloaded_above)
        if overloaded:
            found.append(
                f"layer {load.layer}: overloaded {_experts(overloaded)}, more than {overloaded_above:g} "
                "times the mean load."
            )
    return found


def _experts(ids: Sequence[int]) -> str:
    shown = ", ".join(str(expert) for expert in ids[:8])
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return f"expert{'s' if len(ids) > 1 else ''} {shown}{more}"
