"""Lay out the bytes of a safetensors file, for writers that have one tensor at a time.

Eight bytes with the length of a JSON header, the header (name, dtype, shape and place of each tensor), the
tensors. The library writes a file from tensors that all exist at once.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "NAME_OF_DTYPE", "bytes_of", "file_header"]

# In the order in which the library sorts tensors by dtype: largest alignment first.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


def file_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, int]:
    """Make the bytes in front of the first tensor; returns them and the size of all tensors together, in bytes.

    Args:
        tensors: dtype and shape by name, in the order in which they will be written.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAME_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def bytes_of(tensor: Tensor) -> memoryview:
    """View the bytes of a CPU tensor, without a copy if it is contiguous."""
    view: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view
