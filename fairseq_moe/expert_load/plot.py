"""The picture of a load record, by matplotlib: a heat map of layers x experts, and its history."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fairseq_moe.errors import MoEError
from fairseq_moe.expert_load.record import LoadRecord
from fairseq_moe.expert_load.summary import LayerLoad, layer_loads

__all__ = ["draw_load"]

# Numbers are written into the cells of a heat map up to this many experts.
_MAX_NUMBERED = 16
_TOP_OF_SCALE = 2.0


def draw_load(path: Path, record: LoadRecord, past: Sequence[LoadRecord]) -> None:
    """Write a PNG: the record as a heat map, and above one record two curves per layer over the updates.

    Args:
        path: where to.
        record: the one to show.
        past: the records of its split, in order of updates.

    Raises:
        MoEError: the file cannot be written.
    """
    loads = layer_loads(record)
    rows = 2 if len(past) > 1 else 1
    height = min(0.55 * len(loads) + 1.4, 8.0)
    figure = Figure(figsize=(9.0, height + 2.8 * (rows - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, 2, height_ratios=[height, 2.8][:rows])
    _draw_heat_map(figure, figure.add_subplot(grid[0, :]), record, loads)
    if rows > 1:
        curves = [(each.update, layer_loads(each)) for each in past]
        left, right = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        _draw_curves(
            left, curves, "busiest expert / mean load", [[x.max_over_mean for x in y] for _, y in curves]
        )
        _draw_curves(
            right, curves, "dropped assignments, %", [[100 * x.drop_frac for x in y] for _, y in curves]
        )
        left.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
        right.set_ylim(bottom=0)
        left.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise MoEError(f"the picture cannot be written to {path}: {error}.") from None


def _draw_heat_map(figure: Any, axes: Any, record: LoadRecord, loads: Sequence[LayerLoad]) -> None:
    ratios = [load.ratios for load in loads]
    image = axes.imshow(ratios, cmap="coolwarm", vmin=0, vmax=_TOP_OF_SCALE, aspect="auto", origin="lower")
    axes.set_title(f"load of the experts: {record.split}, update {record.update:,}")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(loads)), [str(load.layer) for load in loads])
    num_experts = len(ratios[0])
    if num_experts <= _MAX_NUMBERED:
        axes.set_xticks(range(num_experts))
        for row, load in enumerate(loads):
            for expert, share in enumerate(load.shares):
                axes.text(expert, row, f"{100 * share:.1f}%", ha="center", va="center", fontsize="small")
    bar = figure.colorbar(image, ax=axes, extend="max")
    bar.set_label("load / mean load")


def _draw_curves(
    axes: Any,
    curves: Sequence[tuple[int, Sequence[LayerLoad]]],
    label: str,
    values: Sequence[Sequence[float]],
) -> None:
    updates = [update for update, _ in curves]
    for index, load in enumerate(curves[-1][1]):
        series = [row[index] for row in values]
        axes.plot(updates, series, marker=".", linewidth=1.2, label=f"layer {load.layer}")
    axes.set_xlabel("update")
    axes.set_title(label, fontsize="medium")
    axes.grid(alpha=0.3)
