"""SIGTERM and SIGUSR1 in a rank that trains: remembered here, answered by all ranks after the same update.

A handler may run at any point of any rank, so it only sets a flag. The flags travel with the gradient norm
(``stock.step.guard``), so every rank learns of them at the same update, and no rank stops alone.
"""

import os
import signal
import threading
import time
from types import FrameType

__all__ = ["Signals"]

# Launchers pass a signal on to processes that have received it already; what comes so soon is the same one.
_SAME_SIGNAL_SEC = 1.0


class Signals:
    """Remember what this process has been asked for.

    SIGTERM: save and stop. SIGUSR1: save and go on. Another SIGTERM more than a second after the first ends
    the process at once, with exit code 128 + 15.
    """

    def __init__(self) -> None:
        self.stop = False
        self._save = False
        self._stopped_at = 0.0

    def listen(self) -> None:
        """Handle both signals from now on; in a thread other than the main one Python forbids that."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_stop)
            signal.signal(signal.SIGUSR1, self._on_save)

    def take_save(self) -> bool:
        """Tell whether SIGUSR1 has come since the last call."""
        save, self._save = self._save, False
        return save

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop and now - self._stopped_at > _SAME_SIGNAL_SEC:
            os._exit(128 + number)
        if not self.stop:
            self.stop, self._stopped_at = True, now

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
