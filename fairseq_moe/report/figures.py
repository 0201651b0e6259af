"""Draw figures as SVG that stands in a page: lines over updates, and heat maps of the load of experts."""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fairseq_moe.expert_load.record import LoadRecord
from fairseq_moe.expert_load.summary import layer_loads
from fairseq_moe.report.series import Series, thinned

__all__ = ["draw_heat_maps", "draw_lines"]

# A colour that stands for the page's own, light or dark; it appears nowhere else.
_INK = "#010203"
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fairseq_moe",
    "text.parse_math": False,  # names come from logs, and a $ is a $
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}
_WIDTH_IN, _HEIGHT_IN = 5.2, 2.7
_MAX_COLUMNS = 300
_PLAIN_NUMBER = "{x:,g}"
_TOP_OF_SCALE = 2.0


def draw_lines(
    number: int,
    series: Sequence[Series],
    *,
    unit: str,
    alternative: str,
    marks: Sequence[Series] = (),
    is_logarithmic: bool = False,
    from_0: bool = False,
) -> str:
    """Draw lines over updates.

    Args:
        number: of the figure in its page: names inside begin with it.
        series: a line each.
        unit: label of the vertical axis.
        alternative: what a reader who does not see the figure is told.
        marks: lines whose single points are marked, such as those of validations.
        is_logarithmic: of the vertical axis.
        from_0: the vertical axis begins there.

    Returns:
        an ``<svg>`` element for a page.
    """
    with _style():
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=_COLOURS)
        for each in series:
            drawn, _ = thinned(each)
            axes.plot(
                drawn.updates,
                drawn.values,
                linewidth=1.3,
                marker="." if len(drawn.updates) < 3 else None,
                label=each.label,
            )
        for each in marks:
            axes.plot(each.updates, each.values, linewidth=1.0, marker="o", markersize=3.5, label=each.label)
        axes.set_xlabel("updates")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if is_logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif from_0:
            is_flat = not any(value for each in (*series, *marks) for value in each.values)
            axes.set_ylim(bottom=0, top=1 if is_flat else None)
        axes.xaxis.set_major_formatter(_PLAIN_NUMBER)
        axes.yaxis.set_major_formatter(_PLAIN_NUMBER)
        if len(series) + len(marks) > 1:
            axes.legend()
        return _svg(figure, number, alternative)


def draw_heat_maps(
    number: int, records: Sequence[LoadRecord], layers: Sequence[int], *, alternative: str
) -> str:
    """Draw the load of each expert over the updates, a panel per layer.

    Args:
        number: of the figure in its page.
        records: of one split, in order of updates.
        layers: decoder layers to draw.
        alternative: as for ``draw_lines``.

    Returns:
        as ``draw_lines``.
    """
    step = -(-len(records) // _MAX_COLUMNS)
    groups = [records[start : start + step] for start in range(0, len(records), step)]
    with _style():
        height = 1.1 + len(layers) * 1.05
        figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
        panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
        for axes, layer in zip(panels, layers, strict=True):
            columns = [_mean_ratios(group, layer) for group in groups]
            rows = [list(row) for row in zip(*columns, strict=True)]  # (E, columns)
            image = axes.imshow(
                rows,
                aspect="auto",
                origin="lower",
                cmap="coolwarm",
                vmin=0,
                vmax=_TOP_OF_SCALE,
                interpolation="nearest",
                extent=_extent(records, len(rows)),
            )
            axes.set_title(f"layer {layer}", fontsize=9, loc="left")
            axes.set_ylabel("expert")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.grid(visible=False)
            axes.xaxis.set_major_formatter(_PLAIN_NUMBER)
        panels[-1].set_xlabel("updates")
        bar = figure.colorbar(image, ax=list(panels), extend="max", location="bottom", aspect=40)
        bar.set_label("load / mean load")
        bar.outline.set_edgecolor(_INK)
        return _svg(figure, number, alternative)


def _mean_ratios(records: Sequence[LoadRecord], layer: int) -> list[float]:
    """Average each expert's load over records, as a multiple of the mean load: (E,)."""
    found = [load.ratios for each in records for load in layer_loads(each) if load.layer == layer]
    return [sum(values) / len(found) for values in zip(*found, strict=True)]


def _extent(records: Sequence[LoadRecord], num_experts: int) -> tuple[float, float, float, float]:
    first, last = records[0].update, records[-1].update
    margin = (last - first) / max(len(records) - 1, 1) / 2 or 0.5
    return (first - margin, last + margin, -0.5, num_experts - 0.5)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE):
        yield


def _svg(figure: Any, number: int, alternative: str) -> str:
    """Write a figure as an element whose names are its own and whose ink is the page's."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    text = re.sub(r"<svg[^>]*>", "<svg>", text, count=1)
    text = re.sub(r'\bid="', f'id="f{number}-', text)
    text = re.sub(r'href="#', f'href="#f{number}-', text)
    text = text.replace("url(#", f"url(#f{number}-").replace(_INK, "currentColor")
    head = f'<svg {size[0]} role="img" aria-label="{html.escape(alternative)}">'
    return text.replace("xlink:href", "href").replace("<svg>", head, 1).strip()
