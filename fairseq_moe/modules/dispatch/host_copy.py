"""Bring numbers from the device to the host, so that other work is queued before anything waits for them."""

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """Copy integers to the host; the copy begins here and ``wait`` ends it.

    Args:
        values: int64, on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            # Only pinned memory is written without the host's waiting.
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_on_its_way(self) -> bool:
        """Whether ``wait`` may have to wait, so that work should be queued first."""
        return self._values.device.type != "cpu" or self._event is not None

    def wait(self) -> list[list[int]]:
        """Wait for the numbers, of two dimensions, and for nothing that was queued after them."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[list[int]] = self._values.tolist()
        return numbers
