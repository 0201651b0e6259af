"""Say what a run did, section by section: a figure, its numbers in words, a table; or why there is nothing to show."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fairseq_moe.expert_load.summary import LayerLoad, layer_loads, warnings_of
from fairseq_moe.report.facts import Facts
from fairseq_moe.report.figures import draw_heat_maps, draw_lines
from fairseq_moe.report.series import MAX_DRAWN, Series, gate_losses, of, scaled

__all__ = ["Section", "Table", "sections_of"]

_MAX_MAPS = 8
_MAX_LISTED = 20
_OVERLOADED_ABOVE = 2.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Hold the texts of a table."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(kw_only=True)
class Section:
    """Hold a part of the page.

    Args:
        title: its heading.
        svg: its figure; None where nothing can be drawn.
        sentences: what it says.
        table: further numbers.
        is_missing: what it is about was not written.
    """

    title: str
    svg: str | None = None
    sentences: list[str] = field(default_factory=list)
    table: Table | None = None
    is_missing: bool = False


def sections_of(facts: Facts) -> list[Section]:
    """Write all sections, in the order of the page."""
    numbers = itertools.count(1)
    return [
        _loss(facts, next(numbers)),
        _gate_losses(facts, next(numbers)),
        _speed(facts, next(numbers)),
        _mfu(facts, next(numbers)),
        _drops(facts, next(numbers)),
        _load(facts, next(numbers)),
        _dead(facts, next(numbers)),
        _gradient_norm(facts, next(numbers)),
        _memory(facts, next(numbers)),
        _skipped(facts, next(numbers)),
        _plan(facts),
    ]


def _drawn(
    title: str,
    number: int,
    series: Sequence[Series],
    *,
    unit: str,
    marks: Sequence[Series] = (),
    form: str = ",.4g",
    is_logarithmic: bool = False,
    from_0: bool = False,
) -> Section:
    """Draw series that have values, and say in words from where to where each goes."""
    series, marks = [each for each in series if each], [each for each in marks if each]
    told = [_in_words(each, form) for each in (*series, *marks)]
    svg = draw_lines(
        number,
        series,
        unit=unit,
        marks=marks,
        alternative=f"{title}, in {unit}, over updates. {' '.join(told)}",
        is_logarithmic=is_logarithmic
        and all(value > 0 for each in (*series, *marks) for value in each.values),
        from_0=from_0,
    )
    return Section(title=title, svg=svg, sentences=[*told, *_reservations((*series, *marks))])


def _in_words(series: Series, form: str) -> str:
    first, last = format(series.values[0], form), format(series.last, form)
    if len(series.values) == 1:
        return f"{series.label}: {last} at update {series.updates[-1]:,}."
    return (
        f"{series.label}: {first} at update {series.updates[0]:,}, {last} at update {series.updates[-1]:,}; "
        f"lowest {format(min(series.values), form)}, highest {format(max(series.values), form)}."
    )


def _reservations(series: Sequence[Series]) -> Iterator[str]:
    """Say what the figure leaves out; marks are never so many that they are thinned out."""
    longest = max((len(each.values) for each in series), default=0)
    if longest > MAX_DRAWN:
        yield f"Each point of a line is the mean of {-(-longest // MAX_DRAWN)} values."
    left_out = sum(each.num_left_out for each in series)
    if left_out:
        yield f"{left_out:,} values that are not finite are left out."


def _missing(title: str, sentence: str) -> Section:
    return Section(title=title, sentences=[sentence], is_missing=True)


def _loss(facts: Facts, number: int) -> Section:
    train = facts.log.train
    lines = [of(train, "loss", "train, all losses"), of(train, "inner_loss", "train, next word")]
    marks = [
        of(points, name, f"{subset}, {words}")
        for subset, points in facts.log.validations.items()
        for name, words in (("inner_loss", "next word"), ("loss", "loss"))
        if name == "inner_loss" or not of(points, "inner_loss")
    ]
    if not any(lines) and not any(marks):
        return _missing(
            "Loss", "No loss was logged; train with --log-format json, and --log-file or the output kept."
        )
    return _drawn("Loss", number, lines, unit="bits per word", marks=marks)


def _gate_losses(facts: Facts, number: int) -> Section:
    found = gate_losses(facts.log.train)
    if not found:
        return _missing(
            "Gate losses",
            "No gate loss other than 0 was logged; --criterion moe_cross_entropy logs those of a model.",
        )
    return _drawn("Gate losses", number, found, unit="loss, before its weight")


def _speed(facts: Facts, number: int) -> Section:
    wps = facts.wps
    if not wps:
        return _missing("Words per second", "No words per second were logged.")
    section = _drawn("Words per second", number, [wps], unit="words / s, all ranks", form=",.0f", from_0=True)
    section.sentences.append(f"Median: {wps.median:,.0f}.")
    return section


def _mfu(facts: Facts, number: int) -> Section:
    factor = facts.plan.mfu_frac_per_word_per_sec
    title = "Model FLOP utilisation (MFU)"
    if factor is None:
        return _missing(
            title,
            "Not known: a plan.json beside the logs (fairseq-moe-plan --json) says how many FLOP a word takes, and "
            "what the devices' peak is.",
        )
    if not facts.wps:
        return _missing(title, "Not known: no words per second were logged.")
    section = _drawn(
        title,
        number,
        [scaled(facts.wps, 100 * factor, "MFU")],
        unit="% of the devices' peak",
        form=".3g",
        from_0=True,
    )
    section.sentences.append(
        f"Median: {100 * factor * facts.wps.median:.3g} %, of FLOP that the model needs: nothing that is computed "
        "again, and no router."
    )
    return section


def _drops(facts: Facts, number: int) -> Section:
    train = facts.log.train
    names = {
        "drop_rate": "all choices",
        "overflow_expert1": "first choices",
        "overflow_expert2": "second choices",
    }
    found = [of(train, name, label) for name, label in names.items()]
    if not any(found):
        return _missing("Dropped choices", "No drop rate was logged; --criterion moe_cross_entropy logs it.")
    found = [found[0], *(each for each in found[1:] if any(each.values))]
    return _drawn("Dropped choices", number, found, unit="% of choices", from_0=True)


def _load(facts: Facts, number: int) -> Section:
    title = "Load of the experts"
    if not facts.loads:
        return _missing(
            title,
            f"No {facts.load_name} was found; --criterion moe_cross_entropy writes it into the save directory.",
        )
    records = facts.loads
    layers = _spread(records[-1].layers)
    loads = layer_loads(records[-1])
    busiest = max(loads, key=lambda load: load.max_over_mean)
    sentence = (
        f"At update {records[-1].update:,} the busiest expert, in layer {busiest.layer}, has "
        f"{busiest.max_over_mean:.2f} times the mean load of its layer; 1 is balanced, and colours end at 2."
    )
    svg = draw_heat_maps(
        number, records, layers, alternative=f"Heat maps of the load of each expert over updates. {sentence}"
    )
    shown = (
        []
        if len(layers) == len(loads)
        else [f"Drawn are {len(layers)} of {len(loads)} layers; the table has all."]
    )
    return Section(
        title=title,
        svg=svg,
        sentences=[
            sentence,
            *shown,
            *facts.load_notes,
            *warnings_of(loads, overloaded_above=_OVERLOADED_ABOVE)[:_MAX_LISTED],
        ],
        table=Table(
            head=("layer", "busiest / mean", "dropped, %", "dead experts"),
            rows=[_load_row(load) for load in loads],
        ),
    )


def _load_row(load: LayerLoad) -> tuple[str, ...]:
    return (str(load.layer), f"{load.max_over_mean:.2f}", f"{100 * load.drop_frac:.2f}", str(len(load.dead)))


def _spread(layers: Sequence[int]) -> list[int]:
    """Choose layers, the first and the last among them, evenly."""
    if len(layers) <= _MAX_MAPS:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (_MAX_MAPS - 1))] for place in range(_MAX_MAPS)]


def _dead(facts: Facts, number: int) -> Section:
    if not facts.loads:
        return _missing("Dead experts", f"Not known without {facts.load_name}.")
    section = _drawn(
        "Dead experts", number, [facts.dead], unit="experts without a token", form=",.0f", from_0=True
    )
    section.sentences.append(f"There are {facts.num_experts:,} experts, over all layers.")
    return section


def _gradient_norm(facts: Facts, number: int) -> Section:
    norm = of(facts.log.train, "gnorm", "norm of all gradients")
    if not norm:
        return _missing("Gradient norm", "No norm was logged.")
    return _drawn("Gradient norm", number, [norm], unit="norm, before clipping", is_logarithmic=True)


def _memory(facts: Facts, number: int) -> Section:
    found = [each for each in (facts.allocated_gib, facts.reserved_gib) if each]
    if not found:
        return _missing("Memory", "No memory was logged: that is done on GPUs, by the first rank.")
    return _drawn("Memory", number, found, unit="GiB, peak of the first rank's GPU", form=".2f", from_0=True)


def _skipped(facts: Facts, number: int) -> Section:
    title, skipped = "Skipped updates", facts.log.skipped
    if not facts.log.has_output:
        return _missing(
            title, "Not known: the output of the ranks, which tells of them, is not among the logs."
        )
    if not skipped:
        return Section(title=title, sentences=["None."])
    so_far = Series(
        label="skipped so far", updates=list(skipped), values=[float(i + 1) for i in range(len(skipped))]
    )
    section = _drawn(title, number, [], marks=[so_far], unit="updates", form=",.0f", from_0=True)
    last = ", ".join(f"{update:,}" for update in skipped[-_MAX_LISTED:])
    section.sentences.append(
        f"After updates {last}{' (the last ones)' if len(skipped) > _MAX_LISTED else ''}."
    )
    return section


def _plan(facts: Facts) -> Section:
    rows = [(row.what, row.planned, row.measured, row.ratio) for row in facts.comparison]
    if not facts.has_plan and not facts.measured:
        return _missing("Plan and measured", "There is neither a plan.json nor a measured.json here.")
    told = [f"measured.json: {row.what}: {row.measured}." for row in facts.measured if row.planned == "-"]
    rows += [(row.what, row.planned, row.measured, row.ratio) for row in facts.measured if row.planned != "-"]
    missing = [] if facts.has_plan else ["There is no plan.json here."]
    return Section(
        title="Plan and measured",
        sentences=[*missing, *told],
        table=Table(head=("", "planned", "measured", "measured / planned"), rows=rows) if rows else None,
    )
