"""Whole files: written under a temporary name, flushed and then renamed; read without executing anything."""

import argparse
import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fairseq_moe.errors import CheckpointError

__all__ = [
    "UNREADABLE",
    "load_plain",
    "plain_globals",
    "sha256_of",
    "unreadable",
    "write_atomically",
    "write_plain",
]

# What torch's reader raises for files that are damaged, cut off or no checkpoints at all.
UNREADABLE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
_CHUNK_BYTES = 1 << 22


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, then put it in place; a failure leaves ``path`` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_to_disk(path.parent)


def write_plain(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain Python values with ``torch.save``, atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def unreadable(path: Path | str, error: Exception) -> CheckpointError:
    """The sentence about a file whose reading has ended in ``error``, one of ``UNREADABLE``."""
    reason = str(error).split("\n")[0][:200]
    return CheckpointError(
        f"cannot read checkpoint file {path} ({type(error).__name__}: {reason}); restore it from a copy or "
        "load another checkpoint."
    )


def load_plain(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Load a file of tensors and plain Python values.

    Args:
        path: a ``torch.save`` file.
        lazily: map the file instead of reading its tensors.

    Raises:
        CheckpointError: the file cannot be read, or asks for more than tensors and plain values.
    """
    try:
        with plain_globals():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True if lazily else None)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a checkpoint (a dictionary).")
    return state


def plain_globals() -> AbstractContextManager[None]:
    """Inside, ``weights_only`` loading knows argparse.Namespace: a record of values, which runs nothing.

    fairseq saves the flags of its older parts in one (--optimizer sgd, and every checkpoint before 2021).
    """
    return torch.serialization.safe_globals([argparse.Namespace])


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
