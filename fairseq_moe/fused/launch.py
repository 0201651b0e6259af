"""Open the one door to Triton: whether its kernels run for a tensor, and stand-ins where it is not installed.

``TRITON_INTERPRET=1``, set before the first import of triton, makes it run kernels on CPU tensors, slowly; tests do.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["block_of", "cdiv", "has_triton", "jit", "runs_triton", "tl"]

try:
    import triton
    import triton.language as tl
except ImportError:  # no kernel is ever launched then, but their definitions must import
    triton = None

    class tl:  # type: ignore[no-redef]  # noqa: N801
        """Stand in for ``triton.language`` in the kernels' signatures."""

        constexpr = tensor = Any


# Device types whose tensors the kernels take. Tests of the interpreter add "cpu".
DEVICES = {"cuda"}


def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return triton is not None


def runs_triton(*tensors: Tensor) -> bool:
    """Tell whether Triton's kernels take these tensors: it is installed, and they are on a GPU, not in float64."""
    return triton is not None and all(
        tensor.device.type in DEVICES and tensor.dtype != torch.float64 for tensor in tensors
    )


def jit(function: Any) -> Any:
    """Make a Triton kernel of a function; without Triton, leave it as it is."""
    return function if triton is None else triton.jit(function)


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def block_of(size: int, *, most: int | None = None) -> int:
    """Choose a block for an axis: the power of two that covers it, at most ``most``; None: whatever it is."""
    block = 1 << max(size - 1, 1).bit_length()
    return block if most is None else min(most, block)
