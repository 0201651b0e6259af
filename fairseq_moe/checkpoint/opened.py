"""Open a shard, and check that it is the one that a main file names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fairseq_moe.checkpoint.files import sha256_of
from fairseq_moe.checkpoint.manifest import Manifest, ShardEntry
from fairseq_moe.checkpoint.safetensors_bytes import DTYPES
from fairseq_moe.checkpoint.shards import split_key
from fairseq_moe.errors import CheckpointError

__all__ = ["OpenShard", "shard_problem"]


@dataclass(kw_only=True)
class OpenShard:
    """A shard whose header is read and whose tensors can be.

    Args:
        path: of the file.
        expert_ids: global ids of the rows of its expert tensors.
        shapes: of its tensors, by key.
        dtypes: of its tensors, by key.
        scalars: optimizer state that is no tensor, by parameter and state name.
        aliases: further names of parameters in it.
    """

    path: Path
    expert_ids: list[int]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    scalars: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    _file: Any

    @classmethod
    def open(cls, main: Path, entry: ShardEntry) -> "OpenShard":
        """Read the header of the shard ``entry`` of the main file ``main``, and check that it makes sense.

        Raises:
            CheckpointError: it cannot be read, holds other experts, or is reached by a link.
        """
        path = main.parent / entry.file
        if (link := _link(main, entry)) is not None:
            raise CheckpointError(link)
        try:
            file = safe_open(path, framework="pt").__enter__()
            metadata = file.metadata()
            if json.loads(metadata["expert_ids"]) != entry.expert_ids:
                raise CheckpointError(
                    f"{path} holds experts {metadata['expert_ids']}, {main.name} expects {entry.expert_ids}."
                )
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            for key in slices:
                split_key(key)
            return cls(
                path=path,
                expert_ids=entry.expert_ids,
                shapes={key: tuple(piece.get_shape()) for key, piece in slices.items()},
                dtypes={key: DTYPES[piece.get_dtype()] for key, piece in slices.items()},
                scalars=json.loads(metadata["optimizer"]),
                aliases=json.loads(metadata.get("aliases", "{}")),
                _file=file,
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from error

    def tensor(self, key: str) -> Tensor:
        """Read all that the shard holds of the tensor ``key``."""
        try:
            return self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Read rows ``first`` to ``last``, exclusive, of the tensor ``key``."""
        try:
            return self._file.get_slice(key)[first:last]
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error


def shard_problem(main: Path, manifest: Manifest, entry: ShardEntry) -> str | None:
    """Compare a shard with what ``main`` says of it; one sentence if it differs by a byte or is missing, else None."""
    path = main.parent / entry.file
    shard = f"shard {path} (experts {', '.join(map(str, entry.expert_ids)) or 'none'}, and dense tensors)"
    try:
        if (link := _link(main, entry)) is not None:
            return link
        if not path.is_file():
            return f"{shard} is missing; copy its directory along with {main.name}."
        num_bytes = path.stat().st_size
        digest = sha256_of(path) if num_bytes == entry.num_bytes else None
    except OSError as error:
        return f"{shard} cannot be read ({error})."
    said = _read_metadata(path)
    other = None if said is None else _difference(said, main, manifest)
    if digest == entry.sha256:
        return None if other is None else f"{shard} {other}."
    found = f"{num_bytes} bytes" if digest is None else f"sha256 {digest}"
    expected = str(entry.num_bytes) if digest is None else entry.sha256
    if other is None:
        return f"{shard} has {found}, expected {expected}; it is damaged."
    return f"{shard} has {found}, expected {expected}, and {other}."


def _link(main: Path, entry: ShardEntry) -> str | None:
    """Look for a symbolic link on the way from the main file's directory to the shard; one sentence if there is one."""
    path = main.parent / entry.file
    for step in (path, *path.parents[:2]):
        if step.is_symlink():
            return f"shard {path} is reached by the symbolic link {step}; put the file itself there."
    return None


def _read_metadata(path: Path) -> dict[str, str] | None:
    """Read a shard's metadata; None if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return None


def _difference(said: dict[str, str], main: Path, manifest: Manifest) -> str | None:
    """Say how run, update and set in a shard's metadata differ from the main file's; None if they do not."""
    expected = {
        "run_id": str(manifest.run_id),
        "update": str(manifest.update),
        "set": Path(manifest.set_dir).name,
    }
    found = {name: said.get(name) for name in expected}
    if found == expected:
        return None
    return (
        f"says that it belongs to run {found['run_id']}, update {found['update']}, set {found['set']}, where "
        f"{main.name} expects run {expected['run_id']}, update {expected['update']}, set {expected['set']}: "
        "restore all files of one save"
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot read shard {path} ({error}); restore it from a copy.")
