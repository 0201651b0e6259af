"""A progress bar on stderr: rich's if it is installed and someone is looking, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

_LINE_EVERY_SEC = 10.0


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of what is done inside; call the result with the bytes handled since its last call.

    Args:
        label: what is being done.
        total_bytes: of all.
    """
    try:
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        yield _lines(label, total_bytes)
        return
    columns = (
        *Progress.get_default_columns()[:2],
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _lines(label: str, total_bytes: int) -> Callable[[int], None]:
    done, next_sec = 0, time.monotonic() + _LINE_EVERY_SEC

    def advance(count: int) -> None:
        nonlocal done, next_sec
        done += count
        if time.monotonic() > next_sec:
            next_sec = time.monotonic() + _LINE_EVERY_SEC
            print(f"{label}: {done / 1e9:.1f} of {total_bytes / 1e9:.1f} GB", file=sys.stderr, flush=True)

    return advance
