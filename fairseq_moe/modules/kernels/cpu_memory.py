"""CPU memory that is used again, for the large tensors that a layer makes anew in every update.

The C library gives blocks above 32 MiB back to the system as soon as they are freed, and smaller ones often; the
system then clears every page of the next block again, which took a twentieth of the time of a layer of 8 experts and
a fifth of one of 64 (docs/benchmarks.md). torch keeps freed GPU memory for the next tensor; this does the same for a
few large tensors of a CPU.
"""

import math
import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty", "release"]

_MIN_BYTES = 1 << 20  # below, the C library keeps what is freed
# Routing varies the number of rows. A block may be used to half, and is made larger than was asked for; pages that
# nobody has written to take no memory.
_MAX_SIZE_RATIO = 2
_STEPS_PER_DOUBLING = 4
_SPARE_FRAC = 0.25  # what may lie unused, beside what was in use at once


class _Block:
    """Owns some memory, and knows whether a tensor uses it."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8).numpy()
        self._user: weakref.ref[np.ndarray] | None = None

    @property
    def num_bytes(self) -> int:
        return self._memory.size

    @property
    def is_free(self) -> bool:
        return self._user is None or self._user() is None

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a tensor of the memory. It holds ``lent``, which dies with the last tensor that shares its storage."""
        lent = self._memory[:]
        self._user = weakref.ref(lent)
        return torch.frombuffer(lent, dtype=dtype, count=math.prod(shape)).view(tuple(shape))


class _Pool:
    """Owns blocks of at most 1.25 times what was in use at once."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self._most_in_use_bytes = 0
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a tensor of the smallest free block that is large enough and not far too large, or of a new one."""
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            free = sorted(
                (block for block in self.blocks if block.is_free), key=lambda block: block.num_bytes
            )
            in_use_bytes = sum(block.num_bytes for block in self.blocks) - sum(
                block.num_bytes for block in free
            )
            block = next((b for b in free if num_bytes <= b.num_bytes <= _MAX_SIZE_RATIO * num_bytes), None)
            size_bytes = _size(num_bytes) if block is None else block.num_bytes
            self._most_in_use_bytes = max(self._most_in_use_bytes, in_use_bytes + size_bytes)
            if block is None:
                most_bytes = int((1 + _SPARE_FRAC) * self._most_in_use_bytes)
                self._drop(free, keep_bytes=most_bytes - in_use_bytes - size_bytes)
                block = _Block(size_bytes)
                self.blocks.append(block)
            return block.lend(shape, dtype)

    def renew_lock(self) -> None:
        """Replace the lock, in a child process: another thread of its parent may have held it."""
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give all blocks back to the system that no tensor uses."""
        with self._lock:
            self.blocks = [block for block in self.blocks if not block.is_free]
            self._most_in_use_bytes = sum(block.num_bytes for block in self.blocks)

    def _drop(self, free: list[_Block], *, keep_bytes: int) -> None:
        """Give the smallest free blocks back to the system, until the others are at most ``keep_bytes``."""
        free_bytes = sum(block.num_bytes for block in free)
        for block in free:
            if free_bytes <= keep_bytes:
                return
            self.blocks.remove(block)
            free_bytes -= block.num_bytes


def _size(num_bytes: int) -> int:
    step = (1 << (num_bytes - 1).bit_length()) // (2 * _STEPS_PER_DOUBLING)
    return -(-num_bytes // step) * step


_POOL = _Pool()
os.register_at_fork(after_in_child=_POOL.renew_lock)


def empty(shape: Sequence[int], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor with any content, on the device and, unless told otherwise, of the dtype of ``like``.

    Its memory is taken again when no tensor uses it any more. A process keeps blocks of at most 1.25 times those that
    were once in use at the same time; a block may be up to twice as large as what it holds.
    """
    dtype = like.dtype if dtype is None else dtype
    if like.device.type != "cpu" or math.prod(shape) * dtype.itemsize < _MIN_BYTES:
        return like.new_empty(shape, dtype=dtype)
    return _POOL.empty(shape, dtype)


def release() -> None:
    """Give all memory back to the system that no tensor uses, as after the last update of a process that goes on."""
    _POOL.release()
