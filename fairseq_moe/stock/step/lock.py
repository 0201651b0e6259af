"""One training run per save directory, by an flock that ends with the process that holds it."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from fairseq_moe.errors import MoEError

__all__ = ["LOCK_NAME", "SaveDirectoryError", "lock_save_directory"]

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"

# Open for as long as the process lives: closing the file would give the lock up.
_HELD: dict[str, IO[str]] = {}


class SaveDirectoryError(MoEError):
    """Another run writes its checkpoints to this directory."""


def lock_save_directory(save_dir: str | Path) -> None:
    """Hold the lock of ``save_dir`` until this process ends; again in the same process, nothing happens.

    The kernel frees the lock of a process that was killed, so none is ever left behind. The file names the
    owner, for people.

    Raises:
        SaveDirectoryError: another process holds it.
    """
    path = os.path.realpath(Path(save_dir) / LOCK_NAME)
    if path in _HELD:
        return
    file = open(path, "a+")  # noqa: SIM115 (stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise SaveDirectoryError(
            f"--save-dir {save_dir} is in use by another training run ({owner}); choose another directory or "
            "end that run first.",
            agreed=True,
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s), so two runs could write to this directory.", path, error)
        file.close()
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _HELD[path] = file
    os.register_at_fork(after_in_child=file.close)  # data workers outlive a killed rank for some seconds
