"""A Hugging Face directory: its weights, in one file or in shards with an index, quantised ones as what they mean."""

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
from fairseq_moe.convert.hf.fp8 import FP8, SCALE, check_scales, dequantized
from fairseq_moe.convert.hf.leftovers import is_leftover_name
from fairseq_moe.convert.hf.mxfp4 import (
    BLOCKS,
    NAN_SCALE,
    check_blocks,
    decoded,
    is_part,
    parts_of,
    unpacked_names,
    unpacked_shape,
)
from fairseq_moe.errors import CheckpointError

__all__ = [
    "INDEX",
    "SINGLE",
    "TensorDir",
    "digest_of",
    "read_json",
    "read_weight_map",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OF_WEIGHTS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16, FP8})


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

    A weight has one name, by which it is read, even if it lies in several tensors: FP8 with scales, MXFP4 in blocks.

    Args:
        path: of the directory.
        stored: where each tensor lies, scales and blocks as well.
        fp8_block: rows and columns that share a scale; None: nothing is FP8.
        fp8_to: what FP8 and MXFP4 weights become.
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
        cls,
        path: Path,
        *,
        fp8_block: tuple[int, int] | None = None,
        fp8_to: torch.dtype = torch.bfloat16,
        mxfp4: bool = False,
    ) -> "TensorDir":
        """Read the index and the headers of all files.

        Args:
            path: of the directory.
            fp8_block: see the class.
            fp8_to: see the class.
            mxfp4: its config.json says that weights are MXFP4.

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
        check_blocks(path, stored, is_declared=mxfp4)
        found._check_dtypes()
        check_scales(path, stored, fp8_block)
        return found

    def _check_dtypes(self) -> None:
        for name, tensor in self.stored.items():
            if tensor.dtype not in _OF_WEIGHTS and not is_leftover_name(name) and not is_part(name, tensor):
                raise CheckpointError(
                    f"{name} of {self.path} is {tensor.dtype}, expected float32, another dtype of weights, or "
                    "FP8 of the kind e4m3."
                )

    def names(self) -> list[str]:
        """List the names of all weights."""
        return list(unpacked_names([name for name in self.stored if not self._is_scale(name)]))

    def _is_scale(self, name: str) -> bool:
        weight = self.stored.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
        return weight is not None and weight.dtype == FP8

    def is_mxfp4(self, name: str) -> bool:
        """Tell whether a weight lies in blocks."""
        return name not in self.stored and name + BLOCKS in self.stored

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that ``read`` gives a weight."""
        if self.is_mxfp4(name):
            return self.fp8_to
        dtype = self.stored[name].dtype
        return self.fp8_to if dtype == FP8 else dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that ``read`` gives a whole weight."""
        return unpacked_shape(self.stored[name + BLOCKS]) if self.is_mxfp4(name) else self.stored[name].shape

    def parts(self, name: str) -> dict[str, StoredTensor]:
        """List the tensors in which a weight lies, scales of FP8 left out."""
        names = parts_of(name) if self.is_mxfp4(name) else (name,)
        return {part: self.stored[part] for part in names}

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """A weight, dequantised if it is FP8 or MXFP4; one that is not finite is refused.

        Args:
            name: of the weight.
            rows: first and end of those wanted (None: all); parts must be read in their order. Of MXFP4 they are
                experts, and the result is a view, transposed.
        """
        if self.is_mxfp4(name):
            return self._read_mxfp4(name, rows)
        tensor, file = self._read(name, rows), self.stored[name].path
        if tensor.dtype != FP8:
            refuse_not_finite(tensor, name=name, file=file)
            return tensor
        assert self.fp8_block is not None
        scale = self._read(name + SCALE, None)
        refuse_not_finite(scale, name=name + SCALE, file=self.stored[name + SCALE].path)
        dequantize = functools.partial(dequantized, tensor, scale, block=self.fp8_block)
        rounded = dequantize(dtype=self.fp8_to)
        refuse_not_finite(rounded, name=name, file=file, before=dequantize, flag="--fp8-to")
        return rounded

    def _read_mxfp4(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        num_experts, inputs, outputs = self.shape(name)
        first, end = rows or (0, num_experts)
        experts = torch.empty((end - first, outputs, inputs), dtype=self.fp8_to)
        for place, expert in enumerate(range(first, end)):
            blocks, scales = (self._read(part, (expert, expert + 1))[0] for part in parts_of(name))
            self._refuse_nan_scale(name, expert, scales)
            decode = functools.partial(decoded, blocks, scales)
            experts[place] = decode(dtype=self.fp8_to)
            file = self.stored[name + BLOCKS].path
            refuse_not_finite(
                experts[place],
                name=f"{name} (expert {expert})",
                file=file,
                before=decode,
                flag="--fp8-to",
            )
        return experts.transpose(1, 2)

    def _refuse_nan_scale(self, name: str, expert: int, scales: Tensor) -> None:
        if (count := int((scales == NAN_SCALE).sum())) > 0:
            part = parts_of(name)[1]
            raise CheckpointError(
                f"{self.stored[part].path} has {part} with the scale {NAN_SCALE}, which means no number ({count} of "
                f"{scales.numel()} scales of expert {expert}), expected 0 to {NAN_SCALE - 1}; fetch the file again."
            )

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
