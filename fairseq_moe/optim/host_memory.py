"""Memory of CPU training: blocks that are freed in one step are used again in the next.

By itself the C library gives every block above 32 MiB back to the system when it is freed, and the system
clears the pages of the next one again, 4 KiB at a time. The gradients of many experts are such blocks, and
that costs about as much as computing an expert's share of them.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; its resident memory stays at its peak from then on.

    Returns:
        whether the C library can do that: glibc can, others are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
