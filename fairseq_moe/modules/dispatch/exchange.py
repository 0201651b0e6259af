"""What a layer asks of the ranks that share its experts; ``distributed`` fulfils it with process groups.

An exchange is a pair of calls: counts first (integers), then rows with those counts as split sizes. Uneven
and empty splits are legal, so every rank may bring any number of tokens. The calls are the same on every
rank whatever the data.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Exchange", "ExchangeTimes", "LocalExchange"]


class ExchangeTimes:
    """Adds up the time of one forward pass's row exchanges; off unless asked for, since it synchronises.

    ``cpu_ms`` is host wall time, ``cuda_ms`` the time between two CUDA events (0 on CPU), both in ms.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.cpu_ms = 0.0
        self.cuda_ms = 0.0

    def measure(
        self,
        exchange: Any,
        rows: Tensor,
        *splits: list[int],
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """Run ``exchange(rows, *splits)`` and add its time; then nothing else runs meanwhile, but before."""
        if not self.enabled:
            return exchange(rows, *splits, meanwhile=meanwhile)
        if meanwhile is not None:
            meanwhile()
        events = None
        if rows.is_cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        start_sec = time.perf_counter()
        received = exchange(rows, *splits)
        self.cpu_ms += (time.perf_counter() - start_sec) * 1000.0
        if events is not None:
            events[1].record()
            torch.cuda.synchronize()
            self.cuda_ms += events[0].elapsed_time(events[1])
        return received


class Exchange(Protocol):
    """What a dispatcher needs of the G ranks around it; ``size`` is G."""

    size: int

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """Row g of the result is what rank g sends here: int64 (G, L) -> int64 (G, L)."""
        ...

    def rows(
        self,
        rows_RD: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """Send ``send_splits[g]`` rows to rank g, receive ``recv_splits[g]`` from it; differentiable.

        ``meanwhile`` is called once, while the rows are under way where there is a way.
        """
        ...


class LocalExchange:
    """One rank holds all experts of its tokens: nothing moves."""

    size = 1

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """The counts themselves."""
        return send_counts_GL

    def rows(
        self,
        rows_RD: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """The rows themselves."""
        if meanwhile is not None:
            meanwhile()
        return rows_RD
