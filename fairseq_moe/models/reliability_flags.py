"""Flags that say when a run gives up; what they mean is in ``fairseq_moe.flags.reliability``."""

from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import FairseqDataclass

__all__ = ["ReliabilityFlags"]


@dataclass
class ReliabilityFlags(FairseqDataclass):
    """Failures of a run of an MoE model."""

    max_failed_saves: int = field(
        default=3,
        metadata={"help": "end after so many failed saves in a row; until then training goes on"},
    )
    save_in_background: bool = field(
        default=False,
        metadata={"help": "write checkpoints while training goes on, from a copy in memory"},
    )
    max_skipped_updates: int = field(
        default=10,
        metadata={"help": "end after so many updates in a row whose loss or gradients are not finite"},
    )
    collective_timeout_sec: float = field(
        default=600.0,
        metadata={
            "help": "longest wait for another rank, in seconds; three times as long in the first update"
        },
    )
    skip_loss_spikes_factor: Optional[float] = field(
        default=None,
        metadata={
            "help": "also skip an update whose loss is so many robust standard deviations above the median "
            "of the last 128 (default: none)"
        },
    )
