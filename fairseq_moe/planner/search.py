"""Find other mappings of a run: none yet."""

from fairseq_moe.planner.devices import Device
from fairseq_moe.planner.reading import Job

__all__ = ["cheapest_changes"]


def cheapest_changes(job: Job, device: Device) -> tuple[str, ...]:
    """List what would make a run fit."""
    return ()
