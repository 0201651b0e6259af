"""Moving rows between the ranks that share a layer's experts, with gradients.

An exchange is a pair of calls: counts first (integers), then rows with those counts as split sizes. Uneven
and empty splits are legal, so every rank may bring any number of tokens. The calls are the same on every
rank whatever the data.
"""

import time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Exchange", "ExchangeTimes", "GroupExchange", "LocalExchange"]


class ExchangeTimes:
    """Adds up the time of one forward pass's row exchanges; off unless asked for, since it synchronises.

    ``cpu_ms`` is host wall time, ``cuda_ms`` the time between two CUDA events (0 on CPU), both in ms.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.cpu_ms = 0.0
        self.cuda_ms = 0.0

    def measure(self, exchange: Any, rows: Tensor, *splits: list[int]) -> Tensor:
        """Run ``exchange(rows, *splits)`` and add its time."""
        if not self.enabled:
            return exchange(rows, *splits)
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
    """What a dispatcher needs of the ranks around it."""

    size: int

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """Row g of the result is what rank g sends here: int64 (G, L) -> int64 (G, L)."""
        ...

    def rows(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        """Send ``send_splits[g]`` rows to rank g, receive ``recv_splits[g]`` from it; differentiable."""
        ...


class LocalExchange:
    """One rank holds all experts of its tokens: nothing moves."""

    size = 1

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        return send_counts_GL

    def rows(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        return rows_RD


class GroupExchange:
    """all-to-all over a process group of more than one rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size = dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupExchange":
        return self  # a process group cannot be copied, and a copy of the model talks to the same ranks

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        received = torch.empty_like(send_counts_GL)
        dist.all_to_all_single(received, send_counts_GL.contiguous(), group=self._group)
        return received

    def rows(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        return _AllToAll.apply(rows_RD, send_splits, recv_splits, self._group)


class _AllToAll(torch.autograd.Function):
    """all_to_all_single whose gradient is the exchange the other way round."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits = send_splits, recv_splits
        ctx.group = group
        return _all_to_all(rows_RD, send_splits, recv_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send_splits, recv_splits = ctx.splits
        return _all_to_all(grads[0], recv_splits, send_splits, ctx.group), None, None, None


def _all_to_all(
    rows_RD: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = rows_RD.new_empty((sum(recv_splits), *rows_RD.shape[1:]))
    dist.all_to_all_single(received, rows_RD.contiguous(), recv_splits, send_splits, group=group)
    return received
