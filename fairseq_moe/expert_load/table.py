"""The terminal's picture of a load record, by rich."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fairseq_moe.expert_load.record import LoadRecord
from fairseq_moe.expert_load.summary import LayerLoad

__all__ = ["print_load"]

# A cell per expert up to here; more experts become a strip with one character each.
_MAX_CELLS = 16
# Load over mean load, upper bound of each level, the level's character and its colour.
_LEVELS = (
    (0.0, ".", "bold white on red"),
    (0.5, "-", "black on bright_blue"),
    (0.8, "=", "black on cyan"),
    (1.25, "+", "black on green"),
    (2.0, "*", "black on yellow"),
    (float("inf"), "#", "bold white on red"),
)


def print_load(record: LoadRecord, loads: Sequence[LayerLoad], warnings: Sequence[str]) -> None:
    """Print layers x experts to the terminal: share of the assignments, dropped share, busiest expert."""
    console = Console(highlight=False)
    num_experts = len(loads[0].wanted)
    console.print(
        f"Load of {num_experts} experts in {len(loads)} layers, {record.split}, update {record.update:,}: "
        f"{sum(loads[0].wanted):,} assignments per layer"
    )
    console.print(_cells(loads) if num_experts <= _MAX_CELLS else _strips(loads))
    for warning in warnings:
        console.print(f"WARNING {warning}", style="bold red", soft_wrap=True)
    if not warnings:
        console.print("no dead and no overloaded experts", style="green")


def _level(ratio: float) -> tuple[str, str]:
    for bound, character, style in _LEVELS:
        if ratio <= bound:
            return character, style
    raise AssertionError("the last bound is infinite")


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, caption=title, caption_justify="left")
    table.add_column("layer", justify="right", no_wrap=True)
    return table


def _cells(loads: Sequence[LayerLoad]) -> Table:
    """Make a table with each expert's percentage in a cell."""
    num_experts = len(loads[0].wanted)
    table = _table(f"% of the layer's assignments per expert; balanced: {100 / num_experts:.1f}")
    for expert in range(num_experts):
        table.add_column(str(expert), justify="right", no_wrap=True)
    _add_summary_columns(table)
    for load in loads:
        cells: list[Text | str] = [
            Text(f"{100 * share:.1f}", style=_level(ratio)[1])
            for share, ratio in zip(load.shares, load.ratios, strict=True)
        ]
        table.add_row(str(load.layer), *cells, *_summary(load))
    return table


def _strips(loads: Sequence[LayerLoad]) -> Table:
    """Make a table with one character per expert."""
    table = _table(
        "load over mean load, one character per expert: . none, - up to 0.5, = up to 0.8, + up to 1.25, * "
        "up to 2, # above"
    )
    table.add_column("experts 0, 1, 2, ...", overflow="fold")
    _add_summary_columns(table)
    for load in loads:
        strip = Text()
        for ratio in load.ratios:
            strip.append(*_level(ratio))
        table.add_row(str(load.layer), strip, *_summary(load))
    return table


def _add_summary_columns(table: Table) -> None:
    for name in ("drop %", "max/mean"):
        table.add_column(name, justify="right", no_wrap=True)


def _summary(load: LayerLoad) -> list[str]:
    return [f"{100 * load.drop_frac:.1f}", f"{load.max_over_mean:.2f}"]
