"""Which finite losses stand out so far that their update had better be skipped."""

import math
import statistics
from collections import deque

__all__ = ["LossSpikes"]

_WINDOW = 128
_MIN_LOSSES = 32  # fewer say nothing about what is usual
_SIGMAS_PER_MAD = 1.4826  # standard deviation of a normal distribution by its median absolute deviation


class LossSpikes:
    """Remember the last losses, and tell when a new one is far above them.

    The limit is the median plus ``factor`` robust standard deviations: neither spikes of the past nor losses
    that are not finite, which are left out, move it much.

    Args:
        factor: robust standard deviations above the median; None: nothing is a spike.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def problem(self, loss: float) -> str | None:
        """Say why ``loss`` is a spike; None if it is not. Either way it is remembered."""
        limit = self._limit()
        if math.isfinite(loss):
            self._losses.append(loss)
        if limit is None or not loss > limit:
            return None
        return f"the loss {loss:.4g} is above {limit:.4g}, the limit by --skip-loss-spikes-factor {self.factor:g}"

    def _limit(self) -> float | None:
        if self.factor is None or len(self._losses) < _MIN_LOSSES:
            return None
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.factor * _SIGMAS_PER_MAD * deviation
