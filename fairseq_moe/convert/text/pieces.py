"""Cut text files into pieces of whole lines, which can be encoded in any order."""

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_moe.errors import ConfigError

__all__ = ["Piece", "cut", "fitting_piece_bytes"]

_SMALLEST_BYTES = 1 << 20
_LARGEST_BYTES = 1 << 25  # a worker holds a piece several times over
_PIECES_AT_LEAST = 64
_SEARCHED_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Name lines of a file that lie behind one another.

    Args:
        name: of the piece, and of no other: the split and a number.
        path: of the file, from the root.
        file_bytes: size of the file when it was cut.
        mtime_ns: when the file had been changed last.
        start: offset of the first byte.
        end: offset behind the last byte.
    """

    name: str
    path: Path
    file_bytes: int
    mtime_ns: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"bytes {self.start} to {self.end} of {self.path}"


def fitting_piece_bytes(total_bytes: int) -> int:
    """Choose a size of pieces for so much text: a power of two, so that a little more text keeps it."""
    size = _SMALLEST_BYTES
    while size < _LARGEST_BYTES and size * _PIECES_AT_LEAST * 2 <= total_bytes:
        size *= 2
    return size


def cut(texts: Mapping[str, Sequence[Path]], piece_bytes: int | None = None) -> dict[str, list[Piece]]:
    """Cut the files of every split, in order, behind the first end of a line at or after each ``piece_bytes``.

    Args:
        texts: files of each split.
        piece_bytes: smallest size of a piece; None: one that fits.

    Raises:
        ConfigError: a file cannot be read, or can be read only once; names all of them.
    """
    sizes, problems = {}, []
    for path in dict.fromkeys(path for paths in texts.values() for path in paths):
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                problems.append(f"cannot read the text {path} in pieces: it is no regular file; give one.")
                continue
            path.open("rb").close()
        except OSError as error:
            problems.append(f"cannot read the text {path} ({error.strerror}).")
        else:
            sizes[path] = status.st_size
    if problems:
        raise ConfigError(problems)
    size = piece_bytes or fitting_piece_bytes(sum(sizes[path] for paths in texts.values() for path in paths))
    return {split: list(_of_split(split, paths, size)) for split, paths in texts.items()}


def _of_split(split: str, paths: Sequence[Path], piece_bytes: int) -> Iterator[Piece]:
    number = 0
    for path in paths:
        status = path.stat()
        for start, end in _bounds(path, status.st_size, piece_bytes):
            yield Piece(
                name=f"{split}-{number:06d}",
                path=path.resolve(),
                file_bytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                start=start,
                end=end,
            )
            number += 1


def _bounds(path: Path, file_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    start = 0
    with path.open("rb") as file:
        while start < file_bytes:
            end = min(file_bytes, start + piece_bytes)
            file.seek(end - 1)
            while end < file_bytes:
                found = file.read(_SEARCHED_BYTES)
                position = found.find(b"\n")
                if position >= 0:
                    end = file.tell() - len(found) + position + 1
                    break
                end = min(file_bytes, file.tell()) if found else file_bytes
            yield start, end
            start = end
