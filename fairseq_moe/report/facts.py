"""Gather what is known of a run from its files, and sum it up in a few numbers."""

from dataclasses import dataclass, field

from fairseq_moe.expert_load.record import RECORD_NAME, LoadRecord
from fairseq_moe.expert_load.summary import layer_loads
from fairseq_moe.report.files import RunFiles, read_json
from fairseq_moe.report.loads import read_loads
from fairseq_moe.report.log import Log, read_log
from fairseq_moe.report.planned import Planned, Row, comparison, measured_rows
from fairseq_moe.report.series import Series, of

__all__ = ["Card", "Facts", "cards_of", "facts_of"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Hold one of the numbers at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(kw_only=True)
class Facts:
    """Hold what is known of a run.

    Args:
        log: its numbers over the updates.
        loads: of the experts, of one split, in order of updates; all of the same layers.
        load_notes: what the reader should know of them.
        plan: what was expected.
        has_plan: there is a plan that can be read.
        measured: what measured.json says.
        problems: one sentence per file that could not be read, or not in full.
    """

    log: Log
    loads: list[LoadRecord] = field(default_factory=list)
    load_notes: list[str] = field(default_factory=list)
    plan: Planned = field(default_factory=Planned)
    has_plan: bool = False
    measured: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    load_name = RECORD_NAME

    @property
    def is_empty(self) -> bool:
        """Tell whether training has written nothing yet."""
        return self.log.is_empty and not self.loads

    @property
    def wps(self) -> Series:
        """Get words per second over all ranks."""
        return of(self.log.train, "wps", "words per second")

    @property
    def allocated_gib(self) -> Series:
        """Get the peak of memory in use, of the first rank's GPU."""
        return of(self.log.train, "cuda_gb_allocated", "allocated")

    @property
    def reserved_gib(self) -> Series:
        """Get the peak of memory that torch has reserved, of the first rank's GPU."""
        return of(self.log.train, "cuda_gb_reserved", "reserved")

    @property
    def dead(self) -> Series:
        """Count experts without a token over all layers."""
        return Series(
            label="dead experts",
            updates=[record.update for record in self.loads],
            values=[float(sum(len(load.dead) for load in layer_loads(record))) for record in self.loads],
        )

    @property
    def num_experts(self) -> int:
        """Count the experts of all layers."""
        return sum(len(counts) for counts in self.loads[-1].wanted)

    @property
    def comparison(self) -> list[Row]:
        """Compare the plan with the log."""
        train = self.log.train
        return comparison(
            self.plan,
            wps=self.wps,
            ups=of(train, "ups"),
            words=of(train, "wpb"),
            reserved_gib=self.reserved_gib,
        )


def _number(value: float) -> str:
    """Write a number with about four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def facts_of(files: RunFiles) -> Facts:
    """Read all files of a run; what cannot be read is a sentence among the problems."""
    facts = Facts(log=read_log(files.logs, numbers=files.numbers))
    for path, count in facts.log.num_damaged.items():
        facts.problems.append(_left_out(path.name, count))
    if files.load is not None:
        facts.loads, facts.load_notes, num_damaged = read_loads(files.load)
        if num_damaged:
            facts.problems.append(_left_out(files.load.name, num_damaged))
    if files.plan is not None:
        plan = read_json(files.plan)
        facts.has_plan = plan is not None
        facts.plan = Planned.from_json(plan or {})
        if plan is None:
            facts.problems.append("plan.json holds no JSON object that can be read, and is left out.")
    if files.measured is not None:
        measured = read_json(files.measured)
        facts.measured = measured_rows(measured or {})
        if measured is None:
            facts.problems.append("measured.json holds no JSON object that can be read, and is left out.")
    return facts


def _left_out(name: str, count: int) -> str:
    lines = "1 line cannot be read and is" if count == 1 else f"{count:,} lines cannot be read and are"
    return f"{name}: {lines} left out."


def cards_of(facts: Facts) -> list[Card]:
    """Sum a run up: the numbers that one looks for first, those that there are."""
    log = facts.log
    train, cards = log.train, [Card(label="state", value="ended" if log.has_ended else "not ended")]
    points = [*train, *(point for each in log.splits.values() for point in each)]
    if points:
        cards.append(Card(label="updates", value=f"{max(point.update for point in points):,}"))
    loss = of(train, "inner_loss") or of(train, "loss")
    if loss:
        cards.append(
            Card(
                label="training loss, bits",
                value=f"{loss.last:.3f}",
                note=f"last; lowest {min(loss.values):.3f}",
            )
        )
    for subset, validated in log.validations.items():
        found = of(validated, "inner_loss") or of(validated, "loss")
        if found:
            note = f"lowest, of {len(found.values)}; last {found.last:.3f}"
            cards.append(Card(label=f"{subset} loss, bits", value=f"{min(found.values):.3f}", note=note))
    wps, factor = facts.wps, facts.plan.mfu_frac_per_word_per_sec
    if wps:
        cards.append(Card(label="words per second", value=_number(wps.median), note="median"))
    if wps and factor is not None:
        cards.append(Card(label="MFU", value=f"{100 * factor * wps.median:.3g} %", note="median"))
    drops = of(train, "drop_rate")
    if drops:
        cards.append(
            Card(
                label="dropped choices",
                value=f"{drops.last:.3g} %",
                note=f"last; median {drops.median:.3g} %",
            )
        )
    if facts.loads:
        cards.append(
            Card(
                label="dead experts", value=f"{facts.dead.last:,.0f}", note=f"last; of {facts.num_experts:,}"
            )
        )
    if log.has_output:
        cards.append(Card(label="skipped updates", value=f"{len(log.skipped):,}"))
    memory = facts.reserved_gib or facts.allocated_gib
    if memory:
        cards.append(Card(label="memory, GiB", value=f"{max(memory.values):.1f}", note="peak, first rank"))
    wall = of(train, "wall")
    if wall:
        cards.append(Card(label="time", value=_time(wall.last), note="since the last start"))
    return cards


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
