"""Flags that say when a run gives up; what they mean is in ``fairseq_moe.reliability``."""

from dataclasses import dataclass, field

from fairseq.dataclass import FairseqDataclass

__all__ = ["ReliabilityFlags"]


@dataclass
class ReliabilityFlags(FairseqDataclass):
    """Failures of a run of an MoE model."""

    max_failed_saves: int = field(
        default=3,
        metadata={"help": "end after so many failed saves in a row; until then training goes on"},
    )
