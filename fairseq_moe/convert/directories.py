"""Make directories that appear complete or not at all, and copy the small files that travel with a model."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq_moe.checkpoint import flush_directory, make_directory
from fairseq_moe.errors import CheckpointError

__all__ = ["appearing", "copy_companions"]

_WEIGHTS = frozenset({".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"})


@contextmanager
def appearing(target: Path, *, within: Path | None = None) -> Iterator[Path]:
    """Yield a directory to be filled; at the end it becomes ``target``, after an error it is gone.

    Args:
        target: to be made.
        within: where it is filled, on the same disk; None: beside ``target``.

    Raises:
        CheckpointError: ``target`` exists, or cannot be made.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; nothing is overwritten, so give another place or remove it.")
    # A name that nobody else has: on shared storage other machines have processes of the same number.
    temporary = (within or target.parent) / f".{target.name}.tmp-{secrets.token_hex(8)}"
    try:
        parents = make_directory(target.parent)
        filling = temporary / target.name
        filling.mkdir(parents=True)
        yield filling
        _flush_tree(filling)
        os.rename(filling, target)
        for parent in parents:
            flush_directory(parent)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        _remove(temporary)


def _remove(directory: Path) -> None:
    """Remove a directory, even if signals stop the removal with an exception; then raise the last one."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except BaseException:
        _remove(directory)
        raise


def _flush_tree(directory: Path) -> None:
    """Flush every file below a directory to the disk, and the entries of all directories."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            flush_directory(path)
    flush_directory(directory)


def _not_written(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write {target} ({error}); there is no trace of it.")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what is beside the weights of a model: config.json, tokenizer, license, ...; returns the names."""
    names = [
        path.name
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
    ]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
