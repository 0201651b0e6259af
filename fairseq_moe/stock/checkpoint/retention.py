"""What stock does with files around a save: copies under further names, and deletion of old ones."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_moe.checkpoint import copy_atomically
from fairseq_moe.stock.checkpoint.background import Commit
from fairseq_moe.stock.proxy import ModuleProxy
from fairseq_moe.stock.seam import seam

__all__ = ["Saving", "current_save", "saving_together"]

logger = logging.getLogger(__name__)


@dataclass
class Saving:
    """Note how far a save of all ranks has come, on rank 0.

    Args:
        written: the main file, once it is complete.
        commit: with --save-in-background, what will be done when it can be completed.
    """

    written: Path | None = None
    commit: Commit | None = None


# A ContextVar, because stock copies and removes files by their names, without the trainer whose they are.
_SAVING: ContextVar[Saving | None] = ContextVar("saving", default=None)


def current_save() -> Saving | None:
    """Get the save of an MoE model that is under way, if any."""
    return _SAVING.get()


@contextmanager
def saving_together() -> Iterator[Saving]:
    """Mark what stock does inside as part of a save of an MoE model by all ranks."""
    saving = Saving()
    token = _SAVING.set(saving)
    try:
        yield saving
    finally:
        _SAVING.reset(token)


@seam(
    "fairseq.file_io:PathManager.copy",
    signature="(src_path, dst_path, overwrite)",
    stock_does="copies a checkpoint to checkpoint_last.pt and checkpoint_best.pt in place",
    breaks="a kill or a full disk tears the very file that the next start loads",
    we_do="while an MoE model is saved, copy the small main file to a temporary name first",
    test="tests/reliability/test_r01_killed_saves.py",
)
def copy(stock: Callable[..., Any], src_path: str, dst_path: str, overwrite: bool = False) -> Any:
    saving = current_save()
    if saving is None:
        return stock(src_path, dst_path, overwrite)
    if saving.commit is not None:
        saving.commit.copies.append(Path(dst_path))
        return dst_path
    copy_atomically(Path(src_path), Path(dst_path))
    return dst_path


@seam(
    "fairseq.checkpoint_utils:os",
    signature=None,
    stock_does="deletes old checkpoints by the numbers in their names",
    breaks="after a restart from an earlier update the files with higher numbers may all be damaged, and the "
    "one that was just written is deleted",
    we_do="while an MoE model is saved, that module's os.remove leaves the file of this save alone",
    test="tests/reliability/test_r26_retention.py",
)
def os_of_checkpoint_utils(stock: Any) -> Any:
    def remove(path: str) -> None:
        saving = current_save()
        if saving is not None and saving.written == Path(path).absolute():
            logger.info("%s is kept: it was just written", path)
        else:
            os.remove(path)

    return ModuleProxy(stock, remove=remove)
