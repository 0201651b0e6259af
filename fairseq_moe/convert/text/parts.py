"""Encode pieces of text into part files, and know of each later whether it still holds that piece."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fairseq_moe.checkpoint import write_atomically
from fairseq_moe.convert.text.pieces import Piece
from fairseq_moe.data.tokenizer import encode_lines
from fairseq_moe.errors import MoEError

__all__ = ["Parts", "Recipe", "own_parts"]

_LINES_AT_ONCE = 1000
_LOCK = "lock"
# Parts, what a killed worker has left of one, and what a killed join has left.
_OWN = re.compile(r"\w+-\d{6}\.part(\.tmp-\d+)?|\..+\.tmp-[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Say how lines become token ids.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        tokenizer_sha256: of its file.
        before: ids in front of each line.
        after: ids behind each line.
        dtype: of the ids in the data, a name that numpy knows.
    """

    tokenizer: Any
    tokenizer_sha256: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: str

    def encode(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode lines as (sizes, int32 with one per line; tokens, all in one row)."""
        sizes, tokens = [np.zeros(0, np.int32)], [np.zeros(0, self.dtype)]
        for first in range(0, len(lines), _LINES_AT_ONCE):
            found = encode_lines(self.tokenizer, lines[first : first + _LINES_AT_ONCE])
            rows = [(*self.before, *ids, *self.after) for ids in found]
            sizes.append(np.array([len(row) for row in rows], dtype=np.int32))
            tokens.append(np.array(list(chain.from_iterable(rows)), dtype=self.dtype))
        return np.concatenate(sizes), np.concatenate(tokens)


class Parts:
    """Keep the parts of one run in a directory that is this process's alone.

    Args:
        directory: of the parts.
        recipe: by which they are made.
    """

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory = directory
        self.recipe = recipe

    def path(self, piece: Piece) -> Path:
        """Name the file of a piece."""
        return self.directory / f"{piece.name}.part"

    def disagreement(self, piece: Piece) -> str | None:
        """Say why a piece is not there: None if it is, "" if nothing is."""
        path = self.path(piece)
        if not path.exists():
            return ""
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                found = file.metadata() or {}
        except (OSError, safetensors.SafetensorError):
            return "it is damaged"
        wanted = self._manifest(piece)
        others = [key for key, value in wanted.items() if found.get(key) != value]
        if not others:
            return None
        key = others[0]
        return f"its {key} was {found.get(key, 'unknown')} and is {wanted[key]} now"

    def make(self, piece: Piece) -> None:
        """Encode a piece and write its part, complete or not at all.

        Raises:
            MoEError: the text cannot be read, has changed or is not UTF-8; the part cannot be written.
        """
        sizes, tokens = self.recipe.encode(_lines(piece))
        data = safetensors.numpy.save({"sizes": sizes, "tokens": tokens}, metadata=self._manifest(piece))
        half = len(data) // 2
        view = memoryview(data)
        try:
            write_atomically(self.path(piece), [view[:half], view[half:]], kind="part", num_bytes=len(data))
        except OSError as error:
            raise MoEError(f"cannot write {self.path(piece)} ({error.strerror}) for {piece}") from error

    def _manifest(self, piece: Piece) -> dict[str, str]:
        import tokenizers

        recipe = self.recipe
        return {
            "text": str(piece.path),
            "text's size": f"{piece.file_bytes} bytes",
            "text's time of change": f"{piece.mtime_ns} ns",
            "place": f"bytes {piece.start} to {piece.end}",
            "tokenizer": f"{recipe.tokenizer_sha256} by tokenizers {tokenizers.__version__}",
            "beginning and end tokens": json.dumps([recipe.before, recipe.after]),
            "dtype": recipe.dtype,
        }


def _lines(piece: Piece) -> list[str]:
    try:
        with piece.path.open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(piece.start)
            data = file.read(piece.end - piece.start)
    except OSError as error:
        raise MoEError(f"cannot read the text {piece.path} ({error.strerror}), {piece}") from error
    if (status.st_size, status.st_mtime_ns) != (piece.file_bytes, piece.mtime_ns):
        raise MoEError(f"the text {piece.path} was changed while it was read; let it rest")
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        offset = piece.start + error.start
        raise MoEError(
            f"cannot read the text {piece.path} as UTF-8: line {_line_number(piece.path, offset)}, byte {offset} "
            f"({error.reason}); correct it or convert the file"
        ) from error
    if not lines[-1]:
        lines.pop()  # behind the end of the last line
    return lines


def _line_number(path: Path, offset: int) -> int:
    """Count the lines up to the one that holds a byte, from 1."""
    number = 1
    with path.open("rb") as file:
        while offset > 0 and (found := file.read(min(offset, 1 << 20))):
            number += found.count(b"\n")
            offset -= len(found)
    return number


@contextmanager
def own_parts(directory: Path, recipe: Recipe) -> Iterator[Parts]:
    """Make the directory of the parts, or go on with an earlier one; without an error inside it is gone at the end.

    Raises:
        MoEError: another process is at work there, or it holds files of someone else; or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        foreign = [entry.name for entry in directory.iterdir() if not _is_own(entry)]
        if foreign:
            raise MoEError(
                f"{directory} is where finished pieces are kept and holds {foreign[0]}, which is none; move it or give "
                "another --destdir."
            )
        with (directory / _LOCK).open("w") as lock:
            _take(lock.fileno(), directory)
            for left in directory.glob("*.tmp-*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield Parts(directory, recipe)
            shutil.rmtree(directory)
    except OSError as error:
        raise MoEError(f"cannot use {directory}, where finished pieces are kept ({error}).") from error


def _is_own(entry: Path) -> bool:
    return entry.name == _LOCK or _OWN.fullmatch(entry.name) is not None


def _take(file: int, directory: Path) -> None:
    """Lock an open file for this process; workers do not inherit the lock, so it ends with the process."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise MoEError(
            f"another process is writing into {directory} ({error.strerror}); wait for it or give another --destdir."
        ) from error
