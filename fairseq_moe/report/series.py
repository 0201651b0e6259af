"""Turn points of a log into what is drawn and summed up: series by name, thinned out, and a few numbers of each."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fairseq_moe.report.log import Point

__all__ = ["Series", "gate_losses", "of", "scaled", "thinned"]

_GATE_LOSS = re.compile(r"^(moe_\w*loss|mtp_loss)$")
MAX_DRAWN = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """Hold one number over the updates; the values are finite.

    Args:
        label: what a legend calls it.
        updates: number of updates done at each.
        values: as many.
        num_left_out: values that were not finite.
    """

    label: str
    updates: list[int]
    values: list[float]
    num_left_out: int = 0

    def __bool__(self) -> bool:
        """Tell whether there is any value."""
        return bool(self.values)

    @property
    def last(self) -> float:
        """Return the last value."""
        return self.values[-1]

    @property
    def median(self) -> float:
        """Return the median, which the first updates and pauses for a save hardly move."""
        return statistics.median(self.values)


def of(points: Sequence[Point], name: str, label: str | None = None) -> Series:
    """Take one number out of all points that have it.

    Args:
        points: of a log.
        name: of the number.
        label: default: the name.
    """
    found = [(point.update, point.values[name]) for point in points if name in point.values]
    finite = [(update, value) for update, value in found if math.isfinite(value)]
    return Series(
        label=label or name,
        updates=[update for update, _ in finite],
        values=[value for _, value in finite],
        num_left_out=len(found) - len(finite),
    )


def gate_losses(points: Sequence[Point]) -> list[Series]:
    """List the losses of routers, and of words further ahead, that are ever other than 0."""
    names = dict.fromkeys(name for point in points for name in point.values if _GATE_LOSS.match(name))
    found = [of(points, name) for name in names]
    return [series for series in found if any(series.values)]


def scaled(series: Series, factor: float, label: str) -> Series:
    """Multiply all values, under another name."""
    return Series(
        label=label,
        updates=series.updates,
        values=[value * factor for value in series.values],
        num_left_out=series.num_left_out,
    )


def thinned(series: Series, most: int = MAX_DRAWN) -> tuple[Series, int]:
    """Replace values in a row by their mean, at the last one's update, until few enough are left.

    Returns:
        the series, and of how many values each is the mean.
    """
    step = math.ceil(len(series.values) / most) if series else 1
    if step == 1:
        return series, 1
    starts = range(0, len(series.values), step)
    return (
        Series(
            label=series.label,
            updates=[series.updates[min(start + step, len(series.updates)) - 1] for start in starts],
            values=[statistics.fmean(series.values[start : start + step]) for start in starts],
            num_left_out=series.num_left_out,
        ),
        step,
    )
