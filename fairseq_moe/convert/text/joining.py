"""Put parts in order into one data set of fairseq's kind ``mmap``."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors

__all__ = ["join"]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1


def join(
    parts: Sequence[Path], prefix: Path, dtype: str, dtype_code: int, advance: Callable[[int], None]
) -> int:
    """Write PREFIX.bin and PREFIX.idx, the bytes that fairseq's own builder would write.

    Args:
        parts: files with tensors ``sizes`` (int32) and ``tokens``.
        prefix: of both files.
        dtype: of the tokens.
        dtype_code: its number in fairseq's header.
        advance: called with the bytes of each part.

    Returns:
        tokens in all.
    """
    sizes = [np.zeros(0, np.int32)]
    with Path(f"{prefix}.bin").open("wb") as file:
        for path in parts:
            with safetensors.safe_open(path, framework="numpy") as part:
                sizes.append(part.get_tensor("sizes"))
                tokens = part.get_tensor("tokens")
            assert tokens.dtype == np.dtype(dtype), path
            file.write(tokens.tobytes())
            advance(tokens.nbytes)
    all_sizes = np.concatenate(sizes)
    ends = np.cumsum(all_sizes, dtype=np.int64)
    pointers = (ends - all_sizes) * np.dtype(dtype).itemsize
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(_MAGIC + struct.pack("<QBQ", _VERSION, dtype_code, len(all_sizes)))
        file.write(all_sizes.tobytes())
        file.write(pointers.tobytes())
    return int(ends[-1]) if len(ends) else 0
