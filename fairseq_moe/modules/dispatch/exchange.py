"""Ask the ranks that share a layer's experts for rows: the Exchange protocol, and exchanges that need no process group.

``distributed.GroupExchange`` is the one between processes. Counts go first (integers), then rows with those counts as
split sizes. Uneven and empty splits are legal, so every rank may bring any number of tokens. The calls are the same on
every rank whatever the data.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Arrived", "Exchange", "ExchangeTimes", "LocalExchange", "NoExchange", "TimedExchange", "Transfer"]


class Transfer(Protocol):
    """Rows under way from other ranks."""

    def arrive(self) -> Tensor:
        """Wait for the rows and return them; called once."""
        ...


class Exchange(Protocol):
    """Trade counts and rows with the G ranks of an expert group; ``size`` is G."""

    size: int

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """Trade counts: entry g of the result is what rank g sends here; int64 (G, L) -> int64 (G, L)."""
        ...

    def send(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Transfer:
        """Send ``send_splits[g]`` rows to rank g, to receive ``recv_splits[g]`` from it; differentiable.

        What is computed before the transfer's ``arrive`` is computed while the rows travel, and its backward pass
        while their gradients do, where the ranks can compute and communicate at once.
        """
        ...

    def gather(self, rows_RD: Tensor) -> Transfer:
        """Bring the rows of all ranks here, in rank order: (R, D) -> (G R, D), with one R for all; differentiable.

        Gradients of a row add up over the ranks that got it.
        """
        ...

    def scatter_sum(self, rows_RD: Tensor) -> Transfer:
        """Add up what all ranks hold for this rank's rows: (G R, D) -> (R, D), the reverse of ``gather``."""
        ...


@dataclass(frozen=True)
class Arrived:
    """A transfer whose rows are there already."""

    rows_RD: Tensor

    def arrive(self) -> Tensor:
        """Return the rows, which are here."""
        return self.rows_RD


class LocalExchange:
    """Stand in for an exchange on the one rank that holds all experts: nothing moves."""

    size = 1

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """Return the counts as they are."""
        return send_counts_GL

    def send(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Transfer:
        """Return the rows as they are."""
        return Arrived(rows_RD)

    def gather(self, rows_RD: Tensor) -> Transfer:
        """Return the rows as they are."""
        return Arrived(rows_RD)

    def scatter_sum(self, rows_RD: Tensor) -> Transfer:
        """Return the rows as they are."""
        return Arrived(rows_RD)


class NoExchange(LocalExchange):
    """Leave the exchange out, to measure the cost of everything else (the branch's ``--dummy-a2a``).

    Rows for other ranks are given to this rank's own experts, so results are wrong on purpose.

    Args:
        size: G, the ranks that would take part.
    """

    def __init__(self, size: int) -> None:
        self.size = size


@dataclass
class ExchangeTimes:
    """Sum of the times of one forward pass's row exchanges, in ms.

    Args:
        cpu_ms: host wall time.
        cuda_ms: time between two CUDA events; 0 on a CPU.
    """

    cpu_ms: float = 0.0
    cuda_ms: float = 0.0

    def reset(self) -> None:
        """Begin a forward pass with zeros."""
        self.cpu_ms = self.cuda_ms = 0.0


class TimedExchange:
    """Measure the row exchanges of another exchange and add them to ``times``; synchronises the device.

    Args:
        inner: what is measured.
    """

    def __init__(self, inner: Exchange) -> None:
        self.size = inner.size
        self.times = ExchangeTimes()
        self._inner = inner

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """Trade counts through the inner exchange, unmeasured."""
        return self._inner.counts(send_counts_GL)

    def send(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Transfer:
        """Send rows and wait for them."""
        return self._timed(lambda: self._inner.send(rows_RD, send_splits, recv_splits), rows_RD)

    def gather(self, rows_RD: Tensor) -> Transfer:
        """Gather rows and wait for them."""
        return self._timed(lambda: self._inner.gather(rows_RD), rows_RD)

    def scatter_sum(self, rows_RD: Tensor) -> Transfer:
        """Add rows up and wait for them."""
        return self._timed(lambda: self._inner.scatter_sum(rows_RD), rows_RD)

    def _timed(self, begin: Callable[[], Transfer], rows_RD: Tensor) -> Transfer:
        """Begin and wait at once: with other work in between, the time would be that of both."""
        events = None
        if rows_RD.is_cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        start_sec = time.perf_counter()
        received = begin().arrive()
        self.times.cpu_ms += (time.perf_counter() - start_sec) * 1000.0
        if events is not None:
            events[1].record()
            torch.cuda.synchronize()
            self.times.cuda_ms += events[0].elapsed_time(events[1])
        return Arrived(received)
