"""CPU memory that is used again, for the large tensors that a layer makes anew in every update.

The C library gives blocks above 32 MiB back to the system as soon as they are freed, and smaller ones often; the
system then clears every page of the next block again, which costs a tenth of a layer of 8 experts and half of one of
64. torch keeps freed GPU memory for the next tensor; this does the same for a few large tensors of a CPU.
"""

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty"]

_MIN_BYTES = 1 << 20  # below, the C library keeps what is freed
_SPARE = 8  # sizes are rounded up to eighths of a power of two, as routing varies them a little


class _Block:
    """Memory, and who uses it now."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8).numpy()
        self._user: weakref.ref[np.ndarray] | None = None

    @property
    def is_free(self) -> bool:
        return self._user is None or self._user() is None

    def fits(self, num_bytes: int) -> bool:
        return self._memory.size == num_bytes

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The block's next tensor. It holds ``lent``, which dies with the last tensor that shares its storage."""
        lent = self._memory[:]
        self._user = weakref.ref(lent)
        return torch.frombuffer(lent, dtype=dtype, count=math.prod(shape)).view(tuple(shape))


class _Pool:
    """All blocks of this process."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From a free block of the right size; if there is none, all that are free go back to the system."""
        num_bytes = _rounded(math.prod(shape) * dtype.itemsize)
        with self._lock:
            block = next((b for b in self._blocks if b.fits(num_bytes) and b.is_free), None)
            if block is None:
                self._blocks = [b for b in self._blocks if not b.is_free]
                block = _Block(num_bytes)
                self._blocks.append(block)
            return block.lend(shape, dtype)


_POOL = _Pool()


def empty(shape: Sequence[int], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor with any content, on the device and, unless told otherwise, of the dtype of ``like``.

    Its memory is taken again when no tensor uses it any more. What lies unused is kept until a size is asked for that
    none of it fits: so a process keeps what one update needs, and no more than that.
    """
    dtype = like.dtype if dtype is None else dtype
    if like.device.type != "cpu" or math.prod(shape) * dtype.itemsize < _MIN_BYTES:
        return like.new_empty(shape, dtype=dtype)
    return _POOL.empty(shape, dtype)


def _rounded(num_bytes: int) -> int:
    step = (1 << (num_bytes - 1).bit_length()) // (2 * _SPARE)
    return -(-num_bytes // step) * step
