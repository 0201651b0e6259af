"""Write whole files (temporary name, flush, rename, flush of the directory); read files without executing anything."""

import argparse
import hashlib
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fairseq_moe.errors import CheckpointError, MoEError
from fairseq_moe.faults import fault

__all__ = [
    "TEMPORARY",
    "UNREADABLE",
    "OverlappedWriter",
    "check_records",
    "copy_atomically",
    "damage_as_sentence",
    "flush_directory",
    "load_plain",
    "make_directory",
    "plain_globals",
    "sha256_of",
    "unreadable",
    "write_atomically",
    "write_large",
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
    zipfile.BadZipFile,
    zlib.error,
)
TEMPORARY = ".tmp-"  # between a file's name and the number of the process that is writing it
_CHUNK_BYTES = 1 << 22
_WRITE_BACK_BYTES = 1 << 20  # smaller pieces are not worth a call


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview], *, kind: str, num_bytes: int) -> str:
    """Write a temporary file beside ``path``, flush it to disk, then put it in place, once and for all.

    Whatever happens, ``path`` is either as it was or complete; an error leaves no temporary file.

    Args:
        path: its directory is made if need be.
        chunks: the bytes, in order.
        kind: ``shard``, ``main``, ``copy`` or ``part``; names the places of ``fairseq_moe.faults``.
        num_bytes: length of all chunks together.

    Returns:
        the sha256 of the bytes, hexadecimal.

    Raises:
        OSError: the disk is full, the directory cannot be written, ...
    """
    directories = make_directory(path.parent)
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    digest, written, is_half = hashlib.sha256(), 0, False
    try:
        with temporary.open("wb") as file, OverlappedWriter(file) as writer:
            fault(f"save.{kind}_opened")
            for chunk in chunks:
                writer.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                if not is_half and 2 * written >= num_bytes:
                    is_half = True
                    writer.wait()
                    file.flush()
                    fault(f"save.{kind}_half")
            writer.wait()
            file.flush()
            fault(f"save.{kind}_written")
            os.fsync(file.fileno())
        fault(f"save.{kind}_flushed")
        os.replace(temporary, path)
        fault(f"save.{kind}_renamed")
    finally:
        temporary.unlink(missing_ok=True)
    for directory in directories:
        flush_directory(directory)
    return digest.hexdigest()


class OverlappedWriter:
    """Write a file in a second thread, one piece at a time, while the caller hashes that piece and makes the next.

    A copy into the kernel's memory takes longer than a sha256, so the two of them take as long as the first alone. The
    pieces must not change until ``wait``, or the next ``write``, has returned.

    Args:
        file: open for writing; nobody else writes to it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "OverlappedWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True)

    def write(self, data: bytes | memoryview) -> None:
        """Begin to write ``data`` when the piece before it is written.

        Raises:
            OSError: that could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, data)

    def wait(self) -> None:
        """Return when all is written that ``write`` was given; errors as there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if len(data) >= _WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
            # Let the kernel begin to carry it to the disk, or the flush at the end waits for gigabytes.
            self._file.flush()
            os.posix_fadvise(
                self._file.fileno(), self._file.tell() - len(data), len(data), os.POSIX_FADV_DONTNEED
            )


def write_plain(path: Path, state: dict[str, Any]) -> None:
    """Save small tensors and plain Python values with ``torch.save``, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    write_atomically(path, _pieces(data), kind="main", num_bytes=len(data))


def write_large(path: Path, state: dict[str, Any]) -> None:
    """Save a state of any size atomically: straight to the disk, and past the places for faults of ``write_plain``."""
    directories = make_directory(path.parent)
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for directory in directories:
        flush_directory(directory)


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a small file; ``target`` is either what it was or the whole copy."""
    data = memoryview(source.read_bytes())
    write_atomically(target, _pieces(data), kind="copy", num_bytes=len(data))


def _pieces(data: memoryview) -> Iterator[memoryview]:
    """Cut a file into at least two pieces, so that a test can interrupt it when half of it is written."""
    size = max(1, min(_CHUNK_BYTES, (len(data) + 1) // 2))
    return (data[start : start + size] for start in range(0, len(data), size))


def unreadable(path: Path | str, error: Exception) -> CheckpointError:
    """Make the error for a file whose reading has ended in ``error``, one of ``UNREADABLE``."""
    reason = str(error).split("\n")[0][:200]
    return CheckpointError(
        f"cannot read checkpoint file {path} ({type(error).__name__}: {reason}); restore it from a copy or "
        "load another checkpoint."
    )


@contextmanager
def damage_as_sentence(path: Path) -> Iterator[None]:
    """Turn what values of an unexpected form raise inside into one sentence that names the file they came from."""
    try:
        yield
    except MoEError:  # some are ValueErrors, and sentences already
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise unreadable(path, error) from error


def load_plain(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Load a file of tensors and plain Python values, once its records' checksums are found right.

    Args:
        path: a ``torch.save`` file.
        lazily: map the file instead of reading its tensors (files of torch before 1.6 are read all the same).

    Raises:
        CheckpointError: the file cannot be read, or asks for more than tensors and plain values.
    """
    try:
        check_records(path)
        with plain_globals():
            mmap = True if lazily and zipfile.is_zipfile(path) else None
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a checkpoint (a dictionary).")
    return state


def check_records(path: Path) -> None:
    """Compare every record of a ``torch.save`` file with its CRC, which torch's own reader does not do.

    Files that are no zip archives (those of torch before 1.6) have no checksums and are left alone.

    Raises:
        ValueError: a record differs from its checksum; or one of ``UNREADABLE``.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"record {damaged} differs from its checksum")


def plain_globals() -> AbstractContextManager[None]:
    """Let ``weights_only`` loading read argparse.Namespace inside: a record of values, which runs nothing.

    fairseq saves the flags of its older parts in one (--optimizer sgd, and every checkpoint before 2021).
    """
    return torch.serialization.safe_globals([argparse.Namespace])


def sha256_of(path: Path) -> str:
    """Compute the hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def make_directory(path: Path) -> list[Path]:
    """Make a directory and those above it; returns the ones to flush once a file has been put into it.

    They are the directory itself, for the file's entry, and the parent of each one that was missing: after a power
    cut a file is lost with any directory on the way to it that has no entry of its own.
    """
    missing = []
    step = path
    while not step.exists():
        missing.append(step)
        step = step.parent
    path.mkdir(parents=True, exist_ok=True)
    return [path, *(directory.parent for directory in missing)]


def flush_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk, so that a file that was renamed keeps its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
