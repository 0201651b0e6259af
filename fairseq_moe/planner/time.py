"""Estimate a range of seconds for an update, from measured rates and the bytes that travel."""

import functools

from fairseq_moe.parallel.schedule import bubble_frac, with_dummies
from fairseq_moe.planner.devices import Device
from fairseq_moe.planner.flops import (
    expert_flops_per_token,
    flops_per_token,
    hardware_flops_per_token,
)
from fairseq_moe.planner.mapping import Mapping
from fairseq_moe.planner.plan import Sent, StepTime
from fairseq_moe.planner.rates import dense_fracs, expert_fracs
from fairseq_moe.planner.shape import ModelShape

__all__ = ["idle_frac", "seconds_of", "step_time"]

# Of what products alone take, whole runs take so many times as long: docs/benchmarks.md, the slice of Mixtral 8x7B on
# one H200 ran at 227 TFLOPS, and its layer at 470.
_WHOLE_RUN = 470 / 227


def seconds_of(flops: float, ranks: int, flops_per_sec: float) -> float:
    """Divide operations by the rate of all ranks together."""
    return flops / (ranks * flops_per_sec)


def idle_frac(mapping: Mapping) -> float:
    """Give the share of its time that a rank idles, or computes what fills a schedule up."""
    pipe, virtual = mapping.grid.pipe, mapping.virtual
    run = with_dummies(pipe, virtual, mapping.micro_batches)
    return float(1 - (1 - bubble_frac(pipe, virtual, run)) * mapping.micro_batches / run)


def step_time(
    shape: ModelShape,
    mapping: Mapping,
    device: Device,
    sent: tuple[Sent, ...],
    *,
    value_bytes: int,
    state_bytes: int,
) -> StepTime:
    """Estimate how long an update takes.

    Args:
        shape: of the model.
        mapping: of the run.
        device: of each rank.
        sent: what travels.
        value_bytes: of a number that is multiplied; float32 runs at half of the peak of two bytes, or less.
        state_bytes: weights, gradients and optimizer of a rank, which a step reads and writes once.
    """
    peak = device.peak_flops
    if device.runs_kernels and value_bytes > 2:
        peak //= 16  # without tensor cores, as PyTorch's default has it
    experts = expert_flops_per_token(shape, mapping.length)
    rest = flops_per_token(shape, mapping.length) - experts
    again = _again(shape, mapping.length, mapping.recompute)
    slow, fast = expert_fracs(shape, mapping.grid.expert_tensor), dense_fracs()
    ranks, tokens = mapping.grid.world_size, mapping.update_tokens
    best = seconds_of(tokens * experts, ranks, peak * slow[1]) + seconds_of(
        tokens * rest, ranks, peak * fast[1]
    )
    usual = seconds_of(tokens * experts, ranks, peak * slow[0]) + seconds_of(
        tokens * rest, ranks, peak * fast[0]
    )
    usual *= _WHOLE_RUN if device.runs_kernels else 1.5
    busy = 1 / (1 - idle_frac(mapping))
    best, usual = best * again * busy, usual * again * busy
    links = [_link_sec(each, device) for each in sent]
    exposed = sum(sec for sec, each in zip(links, sent, strict=True) if each.axis == "tensor")
    optimizer = state_bytes / device.memory_bytes_per_sec
    slowest = usual + sum(links) + 2 * optimizer
    return StepTime(fast_sec=best + exposed + optimizer, slow_sec=slowest, compute_frac=usual / slowest)


@functools.lru_cache(maxsize=64)
def _again(shape: ModelShape, length: int, recompute: frozenset[str]) -> float:
    """Give the operations with those that are computed again, over the useful ones."""
    return hardware_flops_per_token(shape, length, recompute) / flops_per_token(shape, length)


def _link_sec(sent: Sent, device: Device) -> float:
    return sent.sent_bytes / (
        device.network_bytes_per_sec if sent.crosses_nodes else device.node_bytes_per_sec
    )
