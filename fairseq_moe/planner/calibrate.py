"""Compare a finished run with its plan: what was measured over what was planned.

``RUN_DIR`` is one that ``fairseq-moe-launch`` makes: ``plan.json``, and ``measured.json`` or the training log
``train.jsonl`` (``--log-format json``), of which the last half counts, when rates have settled.
"""

import contextlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_moe.errors import MoEError

__all__ = ["Comparison", "compare", "comparison_lines"]

_GIB = 1 << 30  # what fairseq logs cuda_gb_allocated in


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Hold one number of a run beside its plan's.

    Args:
        what: it counts.
        planned: the plan's: a number, or the ends of a range.
        measured: the run's.
    """

    what: str
    planned: tuple[float, ...]
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over planned; of a range, over its nearer end, and 1 within it."""
        low, high = min(self.planned), max(self.planned)
        if len(self.planned) > 1 and low <= self.measured <= high:
            return 1.0
        return self.measured / (high if self.measured > high else low)


def compare(run_dir: Path) -> list[Comparison]:
    """Compare what a run directory has of words per second and peak memory.

    Raises:
        MoEError: there is no plan, or nothing was measured.
    """
    (low, high), peak_bytes = _planned(run_dir / "plan.json")
    measured = _measured(run_dir)
    found = []
    if "words_per_sec" in measured:
        found.append(Comparison(what="words/s", planned=(low, high), measured=measured["words_per_sec"]))
    if "peak_bytes" in measured:
        found.append(
            Comparison(
                what="peak bytes, margin left out", planned=(peak_bytes,), measured=measured["peak_bytes"]
            )
        )
    if not found:
        raise MoEError(
            f"{run_dir} has neither words per second nor peak memory, in measured.json or train.jsonl; let the run "
            "log with --log-format json."
        )
    return found


def _planned(path: Path) -> tuple[tuple[float, float], float]:
    """Read words per second, from the slowest to the fastest, and the peak without its margin."""
    plan = _read_json(path)
    try:
        low, high = sorted(map(float, plan["words_per_sec"]))
        peak_bytes = float(plan["peak_bytes"] - max(stage["margin_bytes"] for stage in plan["stages"]))
    except (KeyError, TypeError, ValueError) as error:
        low = high = peak_bytes = 0.0
        reason = f" ({type(error).__name__}: {error})"
    else:
        reason = ""
    if min(low, peak_bytes) <= 0:
        raise MoEError(
            f"{path} is not a plan of this version{reason}; write it anew with fairseq-moe-plan --json, or start the "
            "run's command again."
        )
    return (low, high), peak_bytes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoEError(f"cannot read {path} ({error.strerror}); give the directory of a run.") from error
    except (ValueError, RecursionError) as error:
        raise MoEError(f"{path} is damaged: it is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise MoEError(f"{path} is damaged: it holds no JSON object.")
    return found


def _measured(run_dir: Path) -> dict[str, float]:
    """Read measured.json; what it lacks, from the training log."""
    path = run_dir / "measured.json"
    found: dict[str, float] = {}
    if path.is_file():
        values = _read_json(path)
        found = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    rates, allocated = _logged(run_dir / "train.jsonl")
    if rates:
        found.setdefault("words_per_sec", statistics.median(rates[len(rates) // 2 :]))
    if allocated:
        found.setdefault("peak_bytes", max(allocated) * _GIB)
    return found


def _logged(path: Path) -> tuple[list[float], list[float]]:
    """Collect words per second and gigabytes of each line of a training log that has them."""
    rates: list[float] = []
    allocated: list[float] = []
    if not path.is_file():
        return rates, allocated
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        start = line.find("{")
        try:
            values = json.loads(line[start:]) if start >= 0 else {}
        except ValueError:
            continue  # other lines of the log
        for key, into in (("wps", rates), ("cuda_gb_allocated", allocated)):
            value: Any = values.get(key, values.get(f"train_{key}")) if isinstance(values, dict) else None
            with contextlib.suppress(TypeError, ValueError):  # a number that was not there yet
                if float(value) > 0:
                    into.append(float(value))
    return rates, allocated


def comparison_lines(found: list[Comparison]) -> list[str]:
    """Write what was measured beside what was planned."""
    from fairseq_moe.planner.table import text_table

    rows = [
        (
            each.what,
            " to ".join(f"{number:,.0f}" for number in each.planned),
            f"{each.measured:,.0f}",
            f"{each.ratio:.3f}",
        )
        for each in found
    ]
    return text_table(("number", "planned", "measured", "measured / planned"), rows)
