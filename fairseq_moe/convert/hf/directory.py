"""A Hugging Face directory: its tensors, in one file or in shards with an index, FP8 weights as what they mean."""

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint.safetensors_bytes import bytes_of
from fairseq_moe.convert.finite import refuse_not_finite
from fairseq_moe.convert.hf.file import StoredTensor, read_header, read_tensor
from fairseq_moe.convert.hf.leftovers import is_leftover_name
from fairseq_moe.errors import CheckpointError

__all__ = [
    "INDEX",
    "SINGLE",
    "TensorDir",
    "dequantized",
    "digest_of",
    "read_json",
    "read_weight_map",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SCALE = "_scale_inv"
_FP8 = torch.float8_e4m3fn
_FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(_FP8).float()
_OF_WEIGHTS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16, _FP8})
_OF_SCALES = (torch.float32, torch.bfloat16)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a dictionary.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path} ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected a JSON object.")
    return values


def read_weight_map(path: Path) -> dict[str, str]:
    """Read which file holds each tensor, from a JSON file that says so under ``weight_map``.

    Raises:
        CheckpointError: it does not, or names what is no safetensors file of one directory.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from names to files.")
    for file in sorted(set(weight_map.values())):
        # What is not printable may be no file name at all (a NUL, half of a character).
        if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
            raise CheckpointError(
                f"{path} names {file!r}, which is not a file of its directory that ends in .safetensors."
            )
    return weight_map


@dataclass(kw_only=True)
class TensorDir:
    """The tensors of a directory, read one at a time.

    Args:
        path: of the directory.
        stored: where each tensor lies, scales of FP8 weights included.
        fp8_block: rows and columns that share a scale; None: nothing is quantised.
        fp8_to: what FP8 weights become.
        digests: sha256 of each tensor that was read, as it lies in its file.
    """

    path: Path
    stored: dict[str, StoredTensor]
    fp8_block: tuple[int, int] | None
    fp8_to: torch.dtype
    digests: dict[str, str] = field(default_factory=dict)
    _open_digests: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, *, fp8_block: tuple[int, int] | None = None, fp8_to: torch.dtype = torch.bfloat16
    ) -> "TensorDir":
        """Read the index and the headers of all files.

        Raises:
            CheckpointError: a file is missing, damaged, or not what the index says.
        """
        if (path / INDEX).is_file():
            stored = _indexed(path)
        elif (path / SINGLE).is_file():
            stored = read_header(path / SINGLE)
        else:
            raise CheckpointError(
                f"{path} has neither {SINGLE} nor {INDEX}; give a directory with one of them."
            )
        found = cls(path=path, stored=stored, fp8_block=fp8_block, fp8_to=fp8_to)
        found._check_dtypes()
        found._check_scales()
        return found

    def _check_dtypes(self) -> None:
        for name, tensor in self.stored.items():
            if tensor.dtype not in _OF_WEIGHTS and not is_leftover_name(name):
                raise CheckpointError(
                    f"{name} of {self.path} is {tensor.dtype}, expected float32, another dtype of weights, or "
                    "FP8 of the kind e4m3."
                )

    def _check_scales(self) -> None:
        for name, tensor in self.stored.items():
            if tensor.dtype == _FP8:
                scale = self.stored.get(name + _SCALE)
                if scale is None:
                    raise CheckpointError(
                        f"{name} of {self.path} is FP8 and has no {name}{_SCALE}; without it its values are "
                        "unknown."
                    )
                if self.fp8_block is None:
                    raise CheckpointError(
                        f"{name} of {self.path} is FP8, and config.json has no quantization_config."
                    )
                grid = tuple(
                    -(-size // block) for size, block in zip(tensor.shape, self.fp8_block, strict=False)
                )
                if len(tensor.shape) != 2 or scale.shape != grid or scale.dtype not in _OF_SCALES:
                    raise CheckpointError(
                        f"{name}{_SCALE} of {self.path} is {scale.dtype} of shape {scale.shape}, expected "
                        f"float32 or bfloat16 of shape {grid} for a weight of shape {tensor.shape}."
                    )
            elif name.endswith(_SCALE) and self.stored.get(name.removesuffix(_SCALE)) is None:
                raise CheckpointError(f"{name} of {self.path} scales a weight that is not there.")

    def names(self) -> list[str]:
        """Names of all tensors but the scales of FP8 weights."""
        return [name for name in self.stored if not self._is_scale(name)]

    def _is_scale(self, name: str) -> bool:
        weight = self.stored.get(name.removesuffix(_SCALE)) if name.endswith(_SCALE) else None
        return weight is not None and weight.dtype == _FP8

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that ``read`` gives a tensor."""
        dtype = self.stored[name].dtype
        return self.fp8_to if dtype == _FP8 else dtype

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self.stored[name].path.name

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, dequantised if it is FP8; one that is not finite is refused.

        Args:
            name: of the tensor.
            rows: first and end of those wanted (None: all); parts must be read in their order.
        """
        tensor, file = self._read(name, rows), self.stored[name].path
        if tensor.dtype != _FP8:
            refuse_not_finite(tensor, name=name, file=file)
            return tensor
        assert self.fp8_block is not None
        scale = self._read(name + _SCALE, None)
        refuse_not_finite(scale, name=name + _SCALE, file=self.stored[name + _SCALE].path)
        dequantize = functools.partial(dequantized, tensor, scale, block=self.fp8_block)
        rounded = dequantize(dtype=self.fp8_to)
        refuse_not_finite(rounded, name=name, file=file, before=dequantize, flag="--fp8-to")
        return rounded

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        stored = self.stored[name]
        tensor = read_tensor(stored if rows is None else stored.rows(*rows))
        digest = self._open_digests.pop(name, None) or hashlib.sha256()
        digest.update(bytes_of(tensor))
        if rows is None or rows[1] == stored.shape[0]:
            self.digests[name] = digest.hexdigest()
        else:
            self._open_digests[name] = digest
        return tensor


def _indexed(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory with an index, which must say what the files say."""
    weight_map = read_weight_map(path / INDEX)
    files = set(weight_map.values())
    if (path / SINGLE).is_file() and files != {SINGLE}:
        raise CheckpointError(
            f"{path} has both {SINGLE} and {INDEX}, which names other files; transformers reads the first alone, "
            "so remove the one that is not the model."
        )
    missing = sorted(file for file in files if not (path / file).is_file())
    if missing:
        raise CheckpointError(f"{path} lacks the shard {', '.join(missing)} that {INDEX} names; fetch it.")
    unlisted = sorted({file.name for file in path.glob("model-*.safetensors")} - files)
    if unlisted:
        raise CheckpointError(f"{path} has the shard {', '.join(unlisted)}, which {INDEX} does not name.")
    stored: dict[str, StoredTensor] = {}
    for file in sorted(files):
        for name, tensor in read_header(path / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{path / file} holds {name}, which {INDEX} expects in {weight_map.get(name, 'no file')}."
                )
            stored[name] = tensor
    absent = sorted(set(weight_map) - set(stored))
    if absent:
        raise CheckpointError(
            f"{path / weight_map[absent[0]]} lacks {absent[0]}, which {INDEX} expects in it."
        )
    return stored


def dequantized(
    weight: Tensor, scale: Tensor, *, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Multiply FP8 values with the scales of their blocks.

    Args:
        weight: float8 (rows, columns).
        scale: float32 or bfloat16, one per block; blocks at the lower and right edge may be smaller.
        block: rows and columns of a block.
        dtype: of the result; each product is rounded to float32, and then to it.

    Returns:
        (rows, columns).
    """
    codes, num_columns = weight.view(torch.uint8), weight.shape[1]
    result = torch.empty(weight.shape, dtype=dtype)
    for i in range(scale.shape[0]):  # a block of rows stays in the cache
        rows = slice(i * block[0], (i + 1) * block[0])
        # Looking 256 values up is four times as fast as torch's own conversion (one core, 2026-11-27).
        values = _FP8_VALUES.index_select(0, codes[rows].reshape(-1).int()).view(-1, num_columns)
        result[rows] = values * scale[i].repeat_interleave(block[1])[:num_columns]
    return result


def digest_of(digests: dict[str, str], stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    """One digest of a set of tensors, whatever files they lie in.

    Args:
        digests: sha256 of each tensor's bytes.
        stored: dtype and shape of each.
    """
    lines = (
        f"{name} {stored[name][0]} {list(stored[name][1])} {digests[name]}\n" for name in sorted(digests)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
