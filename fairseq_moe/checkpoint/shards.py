"""Write one shard: a safetensors file with whole dense tensors and some experts' slices of each expert tensor.

Keys are ``model/<parameter>`` and ``optimizer/<parameter>/<state>``. The tensors of an expert parameter have
one row per expert of the shard, in the order of its ``expert_ids``; every other tensor is whole. What is no
tensor (Adam's step), which names are further names of a tensor (tied weights), and which run, update and set
the shard belongs to, stands as JSON in the file's metadata.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint.files import write_atomically
from fairseq_moe.checkpoint.manifest import ShardEntry
from fairseq_moe.checkpoint.safetensors_bytes import NAME_OF_DTYPE, bytes_of, file_header
from fairseq_moe.errors import CheckpointError

__all__ = [
    "SETS_DIR",
    "LazyTensor",
    "SetId",
    "ShardContent",
    "StoredTensor",
    "has_expert_rows",
    "key_of",
    "split_key",
    "write_shard",
]

SETS_DIR = "shards"


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is read when it is written, so that a copy of a checkpoint needs memory for one tensor.

    Args:
        dtype: of what ``load`` returns.
        shape: of what ``load`` returns.
        load: reads it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


StoredTensor = Tensor | LazyTensor


@dataclass(frozen=True, kw_only=True)
class SetId:
    """The run, update and name that the shards of one save have in common.

    Args:
        run_id: of the training run, kept when it is resumed.
        update: optimizer updates done.
        name: the set's directory below ``SETS_DIR``; another one for each save.
    """

    run_id: str
    update: int
    name: str

    @classmethod
    def new(cls, *, run_id: str | None, update: int) -> "SetId":
        """Make a name that no other save has; ``run_id`` None starts a new run."""
        return cls(
            run_id=run_id or os.urandom(8).hex(), update=update, name=f"{update}-{os.urandom(4).hex()}"
        )

    def metadata(self) -> dict[str, str]:
        """Convert to the metadata of each shard of the set."""
        return {"format": "2", "run_id": self.run_id, "update": str(self.update), "set": self.name}


@dataclass(kw_only=True)
class ShardContent:
    """The tensors, optimizer state and aliases of one shard.

    Args:
        expert_ids: global ids of the rows of the expert tensors.
        model: parameters and buffers by name.
        optimizer: state of a parameter by its name and the state's name: tensors, numbers, booleans, strings.
        aliases: further names of tensors in ``model`` (tied weights).
    """

    expert_ids: list[int] = field(default_factory=list)
    model: dict[str, StoredTensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, StoredTensor]:
        """Collect every tensor by its key, once it is checked that expert tensors have a row for each expert."""
        found = {key_of(name): tensor for name, tensor in self.model.items()}
        for name, values in self.optimizer.items():
            found |= {key_of(name, state): value for state, value in values.items() if _is_tensor(value)}
        for key, tensor in found.items():
            shape = tuple(tensor.shape)
            if has_expert_rows(key) and shape and shape[0] != len(self.expert_ids):
                raise CheckpointError(
                    f"{key} has shape {shape}, expected one row for each of {len(self.expert_ids)} experts; "
                    "its state cannot be saved."
                )
        return found

    def copied(self, into: "ShardContent | None" = None) -> "ShardContent":
        """Copy all tensors into CPU memory of their own, for training to go on while they are written.

        Args:
            into: an earlier copy that nobody needs any more: its tensors are filled again where they fit, which
                takes a fraction of the time of new memory.
        """
        old = into or ShardContent()
        return ShardContent(
            expert_ids=self.expert_ids,
            model={name: _copy(tensor, old.model.get(name)) for name, tensor in self.model.items()},
            optimizer={
                name: {
                    state: _copy(value, old.optimizer.get(name, {}).get(state))
                    for state, value in values.items()
                }
                for name, values in self.optimizer.items()
            },
            aliases=self.aliases,
        )

    def part(self, is_written: Callable[[str], bool]) -> "ShardContent":
        """Select tensors and optimizer state by parameter name; see ``share_of``."""
        return ShardContent(
            expert_ids=self.expert_ids,
            model={name: tensor for name, tensor in self.model.items() if is_written(name)},
            optimizer={name: values for name, values in self.optimizer.items() if is_written(name)},
            aliases={alias: name for alias, name in self.aliases.items() if is_written(name)},
        )

    def expert_bytes(self) -> int:
        """Add up the bytes of the model's expert tensors."""
        return sum(_num_bytes(tensor) for name, tensor in self.model.items() if has_expert_rows(name))

    def dense_bytes(self) -> dict[str, int]:
        """Measure the bytes of each dense tensor of the model, tied ones once."""
        return {name: _num_bytes(tensor) for name, tensor in self.model.items() if not has_expert_rows(name)}

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Select the optimizer state that is no tensor."""
        return {
            name: {state: value for state, value in values.items() if not _is_tensor(value)}
            for name, values in self.optimizer.items()
        }


def has_expert_rows(name: str) -> bool:
    """Tell by its name or key whether a tensor has one row per expert.

    The format defines it so, and docs/checkpoints.md promises it to other readers: the tensors below
    ``moe_layer.experts``, and no others, have a row for each of the shard's ``expert_ids``. A model's expert parameters
    must therefore have such a name; ``ShardContent.tensors`` refuses one with another number of rows.
    """
    return ".moe_layer.experts." in name


def key_of(name: str, state: str | None = None) -> str:
    """Make the key of a parameter, or of one tensor of its optimizer state."""
    return f"model/{name}" if state is None else f"optimizer/{name}/{state}"


def split_key(key: str) -> tuple[str, str | None]:
    """Split a key into the names of parameter and optimizer state (None: the parameter itself).

    Raises:
        ValueError: it is no key of this format.
    """
    kind, _, name = key.partition("/")
    if kind == "model":
        return name, None
    if kind != "optimizer" or "/" not in name:
        raise ValueError(f"unknown key {key!r}")
    name, _, state = name.rpartition("/")
    return name, state


def write_shard(
    directory: Path, set_id: SetId, *, index: int, num_shards: int, content: ShardContent
) -> ShardEntry:
    """Write one shard, tensor by tensor, atomically.

    Args:
        directory: where the main file will lie.
        set_id: of the set, the same for all its shards.
        index: number of this shard, from 0.
        num_shards: number of shards of the set.
        content: what it holds.

    Returns:
        its entry for the manifest.

    Raises:
        OSError: the file cannot be written; there is no trace of it.
        CheckpointError: the content cannot be stored in this format.
    """
    path = directory / SETS_DIR / set_id.name / f"shard-{index}-of-{num_shards}.safetensors"
    tensors = content.tensors()
    for key, tensor in tensors.items():
        if tensor.dtype not in NAME_OF_DTYPE:
            raise CheckpointError(f"{key} is {tensor.dtype}, which safetensors files cannot hold.")
    keys = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))  # so that all are aligned
    metadata = set_id.metadata() | {
        "expert_ids": json.dumps(content.expert_ids),
        "optimizer": json.dumps(content.scalars()),
        "aliases": json.dumps(content.aliases),
    }
    header, data_bytes = file_header(
        {key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in keys}, metadata
    )
    num_bytes = len(header) + data_bytes
    chunks = _chunks(header, (tensors[key] for key in keys))
    digest = write_atomically(path, chunks, kind="shard", num_bytes=num_bytes)
    return ShardEntry(
        file=path.relative_to(directory).as_posix(),
        expert_ids=list(content.expert_ids),
        num_bytes=num_bytes,
        sha256=digest,
    )


def _chunks(header: bytes, tensors: Iterator[StoredTensor]) -> Iterator[bytes | memoryview]:
    yield header
    for stored in tensors:
        tensor = stored if isinstance(stored, Tensor) else stored.load()
        yield bytes_of(tensor.detach().cpu())


def _num_bytes(tensor: StoredTensor) -> int:
    return int(torch.Size(tensor.shape).numel()) * tensor.dtype.itemsize


def _copy(value: Any, old: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype:
        return old.copy_(value.detach())
    return value.detach().to("cpu", copy=True)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | LazyTensor)
