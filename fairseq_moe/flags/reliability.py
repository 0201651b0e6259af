"""Declare the flags about failures, as one typed record, and refuse values that mean nothing."""

import functools
import math
from dataclasses import dataclass
from typing import Any

from fairseq_moe.flags.records import Group, Range, flag, given_fields, ranges

__all__ = ["ReliabilityConfig"]

_flag = functools.partial(flag, Group.FAILURES)


def _above_0(value: float) -> bool:
    return 0 < value < math.inf


_RANGES: dict[str, Range] = {
    "max_failed_saves": (
        lambda number: number >= 1,
        "at least 1: the number of saves in a row that may fail before the run ends",
    ),
    "max_skipped_updates": (
        lambda number: number >= 1,
        "at least 1: the number of updates in a row that may be skipped before the run ends",
    ),
    "collective_timeout_sec": (_above_0, "a number of seconds above 0"),
    "skip_loss_spikes_factor": (_above_0, "a number above 0; leave it out to skip none"),
}


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Hold the flags of ``transformer_lm`` that say when a run gives up, and how it saves."""

    max_failed_saves: int = _flag(3, "end after so many failed saves in a row; until then training goes on")
    save_in_background: bool = _flag(False, "write checkpoints while training goes on, from a copy in memory")
    max_skipped_updates: int = _flag(
        10, "end after so many updates in a row whose loss or gradients are not finite"
    )
    collective_timeout_sec: float = _flag(
        600.0, "longest wait for another rank, in seconds; three times as long in the first update"
    )
    skip_loss_spikes_factor: float | None = _flag(
        None,
        "also skip an update whose loss is so many robust standard deviations above the median of the last 128 "
        "(default: none)",
    )

    @classmethod
    def from_args(cls, args: Any) -> "ReliabilityConfig":
        """Read the fields that ``args`` (namespace, config, mapping) has; the others keep their defaults."""
        return cls(**given_fields(cls, args))

    def problems(self) -> list[str]:
        """List one sentence per value that cannot be honoured."""
        return ranges(self, _RANGES)
