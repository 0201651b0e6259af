"""One safetensors file, read and written tensor by tensor, with memory for one tensor.

The library maps files into memory, so that a pass over a large one fills the memory it can get; and it writes
a file from tensors that all exist at once. ``checkpoint/safetensors_bytes.py`` describes the format.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint.files import OverlappedWriter
from fairseq_moe.checkpoint.safetensors_bytes import DTYPES, bytes_of, file_header
from fairseq_moe.errors import CheckpointError

__all__ = ["SafetensorsWriter", "StoredTensor", "read_header", "read_tensor"]

_ORDER = {dtype: index for index, dtype in enumerate(DTYPES.values())}
_MAX_HEADER_BYTES = 100_000_000  # as in the library


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        path: of the file.
        dtype: of its elements.
        shape: of the tensor.
        offset: of its first byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, end: int) -> "StoredTensor":
        """The part from row ``first`` to row ``end``, exclusive."""
        shape = (end - first, *self.shape[1:])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return StoredTensor(
            path=self.path, dtype=self.dtype, shape=shape, offset=self.offset + first * row_bytes
        )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        CheckpointError: it cannot be read, is cut off, is no safetensors file, or has a dtype that we do not read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        found = dict(_entries(path, header, start=8 + length))
        end = _end(found, start=8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file or is damaged ({error}); fetch it again."
        ) from error
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, expected {end} by its header: it is cut off or damaged; fetch it again."
        )
    return found


def _entries(path: Path, header: dict[str, Any], *, start: int) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        (first, last), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path} has {name} of dtype {entry['dtype']!r}, which fairseq_moe does not read, expected one of "
                f"{', '.join(DTYPES)}."
            )
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} has the shape {shape!r}")
        tensor = StoredTensor(path=path, dtype=dtype, shape=tuple(shape), offset=start + first)
        # 24.0 equals 24, and is no place in a file.
        is_place = type(first) is int and type(last) is int and first >= 0
        if not is_place or last - first != tensor.num_bytes:
            raise ValueError(f"{name} of shape {tensor.shape} takes bytes {first} to {last}")
        yield name, tensor


def _end(found: Mapping[str, StoredTensor], *, start: int) -> int:
    """Where the last tensor ends; each must begin where another ends, as the library demands."""
    end = start
    for name, tensor in sorted(found.items(), key=lambda entry: (entry[1].offset, entry[1].num_bytes)):
        if tensor.offset != end:
            raise ValueError(f"{name} begins at byte {tensor.offset - start}, not at {end - start}")
        end += tensor.num_bytes
    return end


def read_tensor(stored: StoredTensor) -> Tensor:
    """The tensor, in memory of its own.

    Raises:
        CheckpointError: the file has changed or cannot be read.
    """
    flat = torch.empty(stored.num_bytes, dtype=torch.uint8)
    view: memoryview = flat.numpy().data
    done = 0
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError("it has become shorter")
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {stored.path} ({error}).") from error
    return flat.view(stored.dtype).reshape(stored.shape)


class SafetensorsWriter:
    """A file that is being written; the bytes of its tensors come in the order of ``names``.

    Args:
        path: of the file, which must not exist.
        shapes: dtype and shape of each tensor.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.names = sorted(shapes, key=lambda name: (_ORDER[shapes[name][0]], name))
        header, self.num_bytes = file_header(
            {name: shapes[name] for name in self.names}, metadata={"format": "pt"}
        )
        self._file = path.open("xb")
        self._file.write(header)

    def write(self, tensors: Iterable[Tensor]) -> None:
        """Write all tensors, flush them to disk and close the file."""
        with self._file:
            with OverlappedWriter(self._file) as writer:
                for tensor in tensors:
                    writer.write(bytes_of(tensor))
                writer.wait()
            self._file.flush()
            os.fsync(self._file.fileno())
