"""Say what would make a run fit that does not: the changes that cost least time, one at a time before all at once."""

import dataclasses
from collections.abc import Iterator

from fairseq_moe.planner.devices import Device
from fairseq_moe.planner.mapping import Mapping, States
from fairseq_moe.planner.reading import Job
from fairseq_moe.planner.search import RECOMPUTE, Candidate, flags_of, judge, mappings, search

__all__ = ["cheapest_changes"]


def cheapest_changes(job: Job, device: Device, *, count: int = 3) -> tuple[str, ...]:
    """List the changes of a mapping that does not fit which cost least time, as sentences.

    One change is tried at a time, then all of axes, states and recomputation together.
    """
    tried: dict[str, Candidate] = {}
    for what, mapping in _single_changes(job):
        found = judge(job, mapping, device)
        if found.time is not None:
            tried.setdefault(what, found)
    ordered = sorted(tried.items(), key=lambda pair: pair[1].seconds)[:count]
    if len(ordered) < count:
        for each in search(job, device, count=count - len(ordered)).best:
            ordered.append((f"use {each.mapping.name}: {' '.join(flags_of(each.mapping))}", each))
    if not ordered:
        return (
            f"no mapping of {job.mapping.grid.world_size} ranks fits: take more ranks, or a larger device.",
        )
    return tuple(f"{what} ({_cost(found)})" for what, found in ordered)


def _cost(found: Candidate) -> str:
    assert found.time is not None
    seconds = f"{found.time.fast_sec:.3g} to {found.time.slow_sec:.3g} s"
    return f"{found.peak_bytes / (1 << 30):.1f} GiB, {seconds} per update"


def _single_changes(job: Job) -> Iterator[tuple[str, Mapping]]:
    """Yield mappings that differ in one thing from what the flags say, and that thing's flag."""
    start = job.mapping
    for recompute, flag in zip(
        RECOMPUTE[1:],
        ("--moe-recompute-modules experts", "--moe-layer-recompute", "--checkpoint-activations"),
        strict=True,
    ):
        if not start.recompute:
            yield f"add {flag}", dataclasses.replace(start, recompute=recompute)
    for states, flag in (
        (States.ZERO_1, "--use-distributed-optimizer"),
        (States.ZERO_3, "--use-torch-fsdp2"),
    ):
        if start.states in (States.COPIED, States.ZERO_1) and states is not start.states:
            yield f"use {flag}", dataclasses.replace(start, states=states)
    if start.sequences > 1:
        yield (
            f"use --batch-size 1 --update-freq {start.micro_batches * start.sequences}",
            dataclasses.replace(start, sequences=1, micro_batches=start.micro_batches * start.sequences),
        )
    grid = start.grid
    for other in mappings(job.shape, start):
        is_near = (other.grid.tensor, other.grid.context, other.grid.pipe) == (
            grid.tensor,
            grid.context,
            grid.pipe,
        )
        same = (other.states, other.sequences, other.virtual) == (
            start.states,
            start.sequences,
            start.virtual,
        )
        if (
            is_near
            and same
            and other.grid.expert_tensor == grid.expert_tensor
            and other.grid.expert > grid.expert
        ):
            yield (
                f"use --expert-model-parallel-size {other.grid.expert}",
                dataclasses.replace(start, grid=other.grid),
            )
