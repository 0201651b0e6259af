"""Keep the MXFP4 blocks that a model came with beside its weights, and find those whose weights no training changed.

Nothing here writes MXFP4 from weights: the blocks go back as they came, or the weights are written plain. What the
weights were is known by a digest for each expert, so that a changed stack is found at its first changed expert.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_moe.checkpoint import damage_as_sentence
from fairseq_moe.checkpoint.safetensors_bytes import bytes_of
from fairseq_moe.convert.hf.directory import TensorDir
from fairseq_moe.convert.hf.file import SafetensorsWriter, StoredTensor, read_header, read_tensor
from fairseq_moe.convert.hf.mxfp4 import parts_of
from fairseq_moe.convert.hf.names import OurTensor
from fairseq_moe.convert.store import CONVERSION, StoredModel
from fairseq_moe.errors import CheckpointError
from fairseq_moe.progress import progress

__all__ = ["BlockKeeper", "OriginalBlocks", "module_of", "rows_of"]

_FILES = "mxfp4-*.safetensors"
_MAX_FILE_BYTES = 5_000_000_000


def module_of(weight: str) -> str:
    """Name the experts that a weight belongs to; transformers reads both of their weights from blocks, or neither."""
    return weight.rpartition(".")[0]


def rows_of(stored: StoredTensor) -> Iterator[Tensor]:
    """Read a stack one expert at a time, each (1, ...)."""
    for row in range(stored.shape[0]):
        yield read_tensor(stored.rows(row, row + 1))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


class BlockKeeper:
    """Note what weights were made of blocks, and copy the blocks.

    Args:
        tensors: of the model that is being converted.
    """

    def __init__(self, tensors: TensorDir) -> None:
        self._tensors = tensors
        self._digests: dict[str, dict[int, str]] = {}

    def note(self, weight: str, expert: int, row: Tensor) -> None:
        """Remember one expert's row of our tensor, if its weight came as blocks."""
        if self._tensors.is_mxfp4(weight):
            self._digests.setdefault(weight, {})[expert] = _digest(row)

    def write(self, companions: Path) -> dict[str, Any]:
        """Copy all blocks and scales; returns what ``OriginalBlocks`` wants to know, by weight."""
        for number, weights in enumerate(self._groups(), start=1):
            stored = {name: part for weight in weights for name, part in self._tensors.parts(weight).items()}
            writer = SafetensorsWriter(
                companions / _FILES.replace("*", f"{number:05d}"),
                {name: (part.dtype, part.shape) for name, part in stored.items()},
            )
            writer.write(row for name in writer.names for row in rows_of(stored[name]))
        return {
            weight: {
                "dtype": str(self._tensors.dtype(weight)).removeprefix("torch."),
                "experts": [digests[expert] for expert in sorted(digests)],
                "parts": {name: self._tensors.digests[name] for name in parts_of(weight)},
            }
            for weight, digests in self._digests.items()
        }

    def _groups(self) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0
        for weight in self._digests:
            num_bytes = sum(part.num_bytes for part in self._tensors.parts(weight).values())
            if group and size + num_bytes > _MAX_FILE_BYTES:
                yield group
                group, size = [], 0
            group.append(weight)
            size += num_bytes
        if group:
            yield group

    def notes(self) -> list[str]:
        """Say what became of the blocks, for the user."""
        if not self._digests:
            return []
        dtype = str(self._tensors.dtype(next(iter(self._digests)))).removeprefix("torch.")
        how = "rounded" if dtype == "float16" else "exactly"
        return [
            f"MXFP4 weights are now {dtype}, {how}; their blocks are kept in hf, and to-hf writes them again for "
            "experts that training has not changed."
        ]


class _Kept(NamedTuple):
    """Hold what the record says of one weight: its dtype here, a digest for each expert, and those of its parts."""

    dtype: torch.dtype
    experts: list[str]
    parts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class OriginalBlocks:
    """Hold the blocks that a model came with.

    Args:
        record: the file that says so.
        kept: what it says, by weight.
        parts: where blocks and scales lie, by name.
    """

    record: Path
    kept: Mapping[str, _Kept]
    parts: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, companions: Path, entries: Mapping[str, Mapping[str, Any]]) -> "OriginalBlocks":
        """Read the headers of the files.

        Args:
            companions: directory that ``BlockKeeper.write`` filled.
            entries: what it returned; empty: there are no blocks.

        Raises:
            CheckpointError: files or entries are damaged or missing.
        """
        record = companions / CONVERSION
        parts: dict[str, StoredTensor] = {}
        with damage_as_sentence(record):
            kept = {
                weight: _Kept(getattr(torch, entry["dtype"]), list(entry["experts"]), dict(entry["parts"]))
                for weight, entry in entries.items()
            }
        for path in sorted(companions.glob(_FILES)) if kept else ():
            parts |= read_header(path)
        if missing := [name for entry in kept.values() for name in entry.parts if name not in parts]:
            raise CheckpointError(
                f"{companions} has no {_FILES} with {missing[0]}, which {CONVERSION} says the model came with; put the "
                "file back, or give --dtype bfloat16 to write plain weights."
            )
        return cls(record=record, kept=kept, parts=parts)

    def untouched(self, model: StoredModel, table: Sequence[OurTensor]) -> set[str]:
        """Find the weights that still are what the blocks mean; those of one layer's experts together or not at all.

        Args:
            model: whose weights are compared.
            table: of its tensors.
        """
        sources = {tensor.blocks[0].name: tensor for tensor in table}
        changed: set[str] = set()
        with damage_as_sentence(self.record):
            names = {weight: sources[weight].name for weight in self.kept}
            num_bytes = sum(
                torch.Size(model.shape(name)).numel() * model.dtype(name).itemsize for name in names.values()
            )
            with progress(f"{model.path.name} beside its MXFP4 blocks", num_bytes) as advance:
                for weight, name in names.items():
                    if module_of(weight) not in changed and self._is_changed(model, name, weight, advance):
                        changed.add(module_of(weight))
        return {weight for weight in self.kept if module_of(weight) not in changed}

    def _is_changed(self, model: StoredModel, name: str, weight: str, advance: Callable[[int], None]) -> bool:
        kept = self.kept[weight]
        for expert in range(model.shape(name)[0]):
            row = model.row(name, expert)
            advance(row.nbytes)
            # A run in float32 saves in float32 what it never changed.
            narrow = row.to(kept.dtype)
            if not torch.equal(narrow.to(row.dtype), row) or _digest(narrow) != kept.experts[expert]:
                return True
        return False

    def check(self, digests: Mapping[str, str]) -> None:
        """Refuse blocks that are not those of the record.

        Args:
            digests: sha256 of what was written, by name.

        Raises:
            CheckpointError: for the first that differs.
        """
        for entry in self.kept.values():
            for name, digest in entry.parts.items():
                if digests.get(name, digest) != digest:
                    raise CheckpointError(
                        f"{self.parts[name].path} is damaged: {name} has another digest than {CONVERSION} says; put "
                        "the file back, or give --dtype bfloat16 to write plain weights."
                    )

    def settings(self, like: Mapping[str, Any], untouched: Collection[str]) -> dict[str, Any]:
        """Make the quantization_config of a model in which these weights alone lie in blocks.

        Args:
            like: the config.json that the model came with.
            untouched: names of the weights.
        """
        settings: dict[str, Any] = dict(like["quantization_config"])
        listed = list(settings.get("modules_to_not_convert") or ())
        plain = {module_of(weight) for weight in self.kept if weight not in untouched}
        return settings | {"modules_to_not_convert": listed + sorted(plain.difference(listed))}

    def notes(self, untouched: Collection[str]) -> list[str]:
        """Say which experts are written as blocks and which are not, for the user."""
        modules = {module_of(weight) for weight in self.kept}
        num_plain = len(modules) - len({module_of(weight) for weight in untouched})
        if num_plain == 0:
            return []
        note = f"The experts of {num_plain} of {len(modules)} layers have been trained since, and are written plain"
        if untouched:
            note += "; those of the others as the MXFP4 blocks that they came as"
        return [note + "."]
