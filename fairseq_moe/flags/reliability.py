"""The flags about failures as one typed record, and every reason to refuse them."""

import math
from dataclasses import dataclass
from typing import Any

from fairseq_moe.flags.records import given_fields

__all__ = ["ReliabilityConfig"]


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Flags of ``transformer_lm`` that say when to give up; see their help texts in ``models``."""

    max_failed_saves: int = 3
    save_in_background: bool = False
    max_skipped_updates: int = 10
    collective_timeout_sec: float = 600.0
    skip_loss_spikes_factor: float | None = None

    @classmethod
    def from_args(cls, args: Any) -> "ReliabilityConfig":
        """Read the fields that ``args`` (namespace, config, mapping) has; the others keep their defaults."""
        return cls(**given_fields(cls, args))

    def problems(self) -> list[str]:
        """One sentence per value that cannot be honoured."""
        found = []
        if self.max_failed_saves < 1:
            found.append(
                f"--max-failed-saves is {self.max_failed_saves}, expected at least 1: the number of saves in a "
                "row that may fail before the run ends."
            )
        if self.max_skipped_updates < 1:
            found.append(
                f"--max-skipped-updates is {self.max_skipped_updates}, expected at least 1: the number of "
                "updates in a row that may be skipped before the run ends."
            )
        if not (math.isfinite(self.collective_timeout_sec) and self.collective_timeout_sec > 0):
            found.append(
                f"--collective-timeout-sec is {self.collective_timeout_sec}, expected a number of seconds "
                "above 0."
            )
        factor = self.skip_loss_spikes_factor
        if factor is not None and not (math.isfinite(factor) and factor > 0):
            found.append(
                f"--skip-loss-spikes-factor is {factor}, expected a number above 0; leave it out to skip none."
            )
        return found
