"""Write new checkpoints: never over an existing file, at once and complete, or not at all."""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq_moe.checkpoint import ModelShape, ShardContent, split_content, write_checkpoint, write_large
from fairseq_moe.checkpoint_tools.tracking import content_bytes, tracked
from fairseq_moe.errors import CheckpointError
from fairseq_moe.progress import progress
from fairseq_moe.stock.step.lock import LOCK_NAME

__all__ = ["check_target", "write_dense", "write_shards"]


def check_target(to: Path) -> None:
    """Refuse a name that is taken or does not end in .pt, and the save directory of a run that is going on.

    Raises:
        CheckpointError: says what to do.
    """
    if to.exists() or to.is_symlink():
        raise CheckpointError(f"{to} exists already and is not overwritten; give another --to, or remove it.")
    if to.suffix != ".pt":
        raise CheckpointError(
            f"--to is {to}, expected a name that ends in .pt: the shards beside it are kept as long as a .pt file "
            "names them."
        )
    if _is_locked(to.parent / LOCK_NAME):
        raise CheckpointError(
            f"a training run saves its checkpoints to {to.parent}, and would delete shards that are not finished; "
            "give a --to in another directory."
        )


def _is_locked(lock: Path) -> bool:
    """Tell whether a running process holds the lock of a save directory."""
    if not lock.is_file():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks has none that are held
            return False
    return False


def write_shards(
    to: Path,
    *,
    state: dict[str, Any],
    run_id: str | None,
    update: int | None,
    shape: ModelShape,
    content_of: Callable[[Sequence[int]], ShardContent],
    num_shards: int,
) -> None:
    """Write an MoE checkpoint of our format, its shards tensor by tensor.

    Args:
        to: its main file.
        state: what that holds besides tensors.
        run_id: of the training run; None: a new one.
        update: optimizer updates done.
        shape: of the model.
        content_of: everything, with the given experts.
        num_shards: number of files for tensors.

    Raises:
        CheckpointError: it cannot be written; there is no trace of it.
    """
    if update is None:
        raise CheckpointError(
            "the checkpoint does not say how many updates it has seen; it cannot be copied."
        )
    parts = split_content(content_of, num_experts=shape.num_experts, num_shards=num_shards)
    with progress("writing", sum(map(content_bytes, parts))) as advance, _as_sentence(to, OSError):
        write_checkpoint(
            to,
            state=state,
            run_id=run_id,
            update=update,
            shape=shape,
            contents=(tracked(part, advance) for part in parts),
            num_shards=num_shards,
        )


def write_dense(to: Path, *, state: dict[str, Any], content: ShardContent) -> None:
    """Write a checkpoint of stock fairseq: one file, which is in memory as a whole while it is written.

    Args:
        to: the file.
        state: what it holds besides the model.
        content: the model.

    Raises:
        CheckpointError: it cannot be written; there is no trace of it.
    """
    with progress("reading", content_bytes(content)) as advance:
        lazy = tracked(content, advance).model
        model = {name: tensor.load() for name, tensor in lazy.items()}  # type: ignore[union-attr]
    model |= {alias: model[name] for alias, name in content.aliases.items()}
    with _as_sentence(to, OSError, RuntimeError):  # the second: torch's writer, when the disk is full
        write_large(to, {**state, "model": model})


@contextmanager
def _as_sentence(to: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise CheckpointError(
            f"cannot write {to} ({str(error).splitlines()[0]}); nothing is left of it: make room or choose another "
            "place, then try again."
        ) from error
