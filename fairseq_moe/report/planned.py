"""Compare a run with its plan: ``plan.json`` and ``measured.json``, whose keys are all named here, beside the log."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq_moe.report.series import Series

__all__ = ["Planned", "Row", "comparison", "measured_rows"]

_GIB = float(1 << 30)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Hold what a plan says; None where it says nothing of the kind.

    Args:
        flop_per_token: forward and backward, of the model (nothing that is computed again).
        num_ranks: that train.
        peak_flop_per_sec: of one rank's device.
        words_per_sec, step_sec: from the slowest to the fastest that is expected.
        update_tokens: words of an update.
        peak_bytes: memory of the rank that needs most.
    """

    flop_per_token: float | None = None
    num_ranks: float | None = None
    peak_flop_per_sec: float | None = None
    words_per_sec: tuple[float, float] | None = None
    step_sec: tuple[float, float] | None = None
    update_tokens: float | None = None
    peak_bytes: float | None = None

    @classmethod
    def from_json(cls, plan: Mapping[str, Any]) -> "Planned":
        """Read what ``fairseq-moe-plan --json`` prints; keys of another kind are left out."""
        device = plan.get("device")
        return cls(
            flop_per_token=_positive(plan.get("flops_per_token")),
            num_ranks=_positive(plan.get("num_ranks")),
            peak_flop_per_sec=_positive(device.get("peak_flops") if isinstance(device, Mapping) else None),
            words_per_sec=_range(plan.get("words_per_sec")),
            step_sec=_range(plan.get("step_sec")),
            update_tokens=_positive(plan.get("update_tokens")),
            peak_bytes=_positive(plan.get("peak_bytes")),
        )

    @property
    def mfu_frac_per_word_per_sec(self) -> float | None:
        """Return the share of all devices' peak that one word per second is; None where the plan does not say."""
        if self.flop_per_token is None or self.num_ranks is None or self.peak_flop_per_sec is None:
            return None
        return self.flop_per_token / (self.num_ranks * self.peak_flop_per_sec)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold a line of the comparison, as text."""

    what: str
    planned: str
    measured: str
    ratio: str


def comparison(plan: Planned, *, wps: Series, ups: Series, words: Series, reserved_gib: Series) -> list[Row]:
    """Compare what a plan expects with the medians of a log, and with its highest memory.

    Args:
        plan: of the run.
        wps: words per second.
        ups: updates per second.
        words: of an update.
        reserved_gib: memory that the first rank's device has reserved.
    """
    step_sec = 1 / ups.median if ups and ups.median > 0 else None
    peak_gib = None if plan.peak_bytes is None else plan.peak_bytes / _GIB
    candidates = [
        ("words per second", plan.words_per_sec, wps.median if wps else None, ",.0f"),
        ("seconds per update", plan.step_sec, step_sec, ".4g"),
        ("words per update", _point(plan.update_tokens), words.median if words else None, ",.0f"),
        ("peak memory, GiB", _point(peak_gib), max(reserved_gib.values) if reserved_gib else None, ",.2f"),
    ]
    return [
        Row(
            what=what,
            planned="-" if expected is None else _shown(expected, form),
            measured="-" if found is None else format(found, form),
            ratio="-" if expected is None or found is None else _ratio(found, expected),
        )
        for what, expected, found, form in candidates
        if expected is not None or found is not None
    ]


def measured_rows(measured: Mapping[str, Any]) -> list[Row]:
    """List what ``measured.json`` says: a number, or one that was planned beside one that was measured."""
    rows = []
    for name, value in measured.items():
        if name == "planned" and isinstance(value, Mapping):
            continue  # the launcher's copy of what ``comparison`` has from the plan itself
        pair = value if isinstance(value, Mapping) else {"measured": value}
        planned, found = pair.get("planned"), pair.get("measured")
        before, after = _positive(planned), _positive(found)
        rows.append(
            Row(
                what=name.replace("_", " "),
                planned=_text(planned),
                measured=_text(found),
                ratio="-" if before is None or after is None else f"{after / before:.2f}",
            )
        )
    return rows


def _ratio(found: float, expected: tuple[float, float]) -> str:
    low, high = expected
    if low < high and low <= found <= high:
        return "as planned"
    return f"{found / (low if found < low else high):.2f}"


def _shown(expected: tuple[float, float], form: str) -> str:
    low, high = (format(value, form) for value in expected)
    return low if low == high else f"{low} to {high}"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _point(value: float | None) -> tuple[float, float] | None:
    return None if value is None else (value, value)


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value <= sys.float_info.max else None


def _range(value: Any) -> tuple[float, float] | None:
    """Read two positive numbers, the lower first."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    first, second = (_positive(each) for each in value)
    return None if first is None or second is None else (min(first, second), max(first, second))
