"""Say how fast products run, from measured rates: per width of experts, and of all else."""

import itertools
import math

from fairseq_moe.planner.shape import ModelShape

__all__ = ["dense_fracs", "expert_fracs"]

_REFERENCE_TFLOPS = 989.4  # the peak of the H200 that was measured
# docs/benchmarks.md, The layer before the kernels, one H200, 2026-11-27: values of an expert's matrix (D x F), TFLOPS
# of the whole layer as it was, and of its six products alone, forward and backward in bfloat16.
_EXPERTS = (
    (1536 * 256, 160.0, 580.0),
    (2048 * 768, 285.0, 625.0),
    (2048 * 1408, 315.0, 618.0),
    (4096 * 2048, 445.0, 635.0),
    (4096 * 14336, 485.0, 644.0),
)
# There, dense networks of as many rows; the second is the ceiling: one product of 8192^3.
_DENSE = (460.0, 774.0)


def expert_fracs(shape: ModelShape, parts: int) -> tuple[float, float]:
    """Give the shares of a device's peak at which experts run: as whole layers, and as products alone.

    Between measured sizes they are interpolated in the logarithm of the size of an expert's matrix.

    Args:
        shape: of the model.
        parts: X, ranks over which an expert's width is divided.
    """
    size = math.log(max(shape.dim * shape.expert_dim // parts, 1))
    low, high = _EXPERTS[0][1:]
    for (small, slow, fast), (large, slow_2, fast_2) in itertools.pairwise(_EXPERTS):
        share = (size - math.log(small)) / (math.log(large) - math.log(small))
        share = min(max(share, 0.0), 1.0)
        if share > 0:
            low, high = slow + share * (slow_2 - slow), fast + share * (fast_2 - fast)
    return low / _REFERENCE_TFLOPS, high / _REFERENCE_TFLOPS


def dense_fracs() -> tuple[float, float]:
    """Give the shares of a device's peak at which dense networks and attention run."""
    return _DENSE[0] / _REFERENCE_TFLOPS, _DENSE[1] / _REFERENCE_TFLOPS
