"""SIGTERM and SIGINT in a command that fills a directory: an exception, so that what is incomplete is removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["Stopped", "stopped_by_signals"]

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Says that a signal has asked the command to stop; no ``Exception``, which code in between may handle.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise ``Stopped`` inside for each SIGTERM and SIGINT; only the main thread may, and receives them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)
