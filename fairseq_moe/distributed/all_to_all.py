"""Exchange rows between the ranks that share a layer's experts, with gradients, over a process group.

The protocol is ``Exchange`` in ``fairseq_moe.modules.dispatch.exchange``. Each kind of exchange begins without waiting
for it, and its gradient takes the kind that undoes it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_moe.distributed.sharding import all_gather_single, reduce_scatter_single
from fairseq_moe.modules.dispatch.exchange import Transfer

__all__ = ["GroupExchange"]


class GroupExchange:
    """Exchange rows over a process group of more than one rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size = dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupExchange":
        return self  # a process group cannot be copied, and a copy of the model talks to the same ranks

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """Trade L counts with every rank."""
        received = torch.empty_like(send_counts_GL)
        dist.all_to_all_single(received, send_counts_GL.contiguous(), group=self._group)
        return received

    def send(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Transfer:
        """Begin an all-to-all with uneven splits; its gradient travels the other way round."""
        return _begin(rows_RD, _AllToAll(self._group, send_splits, recv_splits))

    def gather(self, rows_RD: Tensor) -> Transfer:
        """Begin an all-gather; its gradient is a reduce-scatter."""
        return _begin(rows_RD, _AllGather(self._group))

    def scatter_sum(self, rows_RD: Tensor) -> Transfer:
        """Begin a reduce-scatter; its gradient is an all-gather."""
        return _begin(rows_RD, _ReduceScatter(self._group))


class _Collective(Protocol):
    """One kind of exchange."""

    def begin(self, rows_RD: Tensor) -> tuple[Any, Tensor]:
        """Begin it without waiting: what is waited for, and what will hold the rows that arrive."""
        ...

    @property
    def back(self) -> "_Collective":
        """The exchange of its gradients."""
        ...


@dataclass(frozen=True)
class _AllToAll:
    group: dist.ProcessGroup
    send_splits: list[int]
    recv_splits: list[int]

    def begin(self, rows_RD: Tensor) -> tuple[Any, Tensor]:
        received = rows_RD.new_empty((sum(self.recv_splits), *rows_RD.shape[1:]))
        work = dist.all_to_all_single(
            received, rows_RD, self.recv_splits, self.send_splits, group=self.group, async_op=True
        )
        return work, received

    @property
    def back(self) -> "_AllToAll":
        return _AllToAll(self.group, self.recv_splits, self.send_splits)


@dataclass(frozen=True)
class _AllGather:
    group: dist.ProcessGroup

    def begin(self, rows_RD: Tensor) -> tuple[Any, Tensor]:
        received = rows_RD.new_empty((dist.get_world_size(self.group) * len(rows_RD), *rows_RD.shape[1:]))
        return all_gather_single(received, rows_RD, group=self.group, async_op=True), received

    @property
    def back(self) -> "_ReduceScatter":
        return _ReduceScatter(self.group)


@dataclass(frozen=True)
class _ReduceScatter:
    group: dist.ProcessGroup

    def begin(self, rows_RD: Tensor) -> tuple[Any, Tensor]:
        received = rows_RD.new_empty((len(rows_RD) // dist.get_world_size(self.group), *rows_RD.shape[1:]))
        return reduce_scatter_single(received, rows_RD, group=self.group, async_op=True), received

    @property
    def back(self) -> _AllGather:
        return _AllGather(self.group)


def _begin(rows_RD: Tensor, collective: _Collective) -> Transfer:
    flight = _Flight()
    return _Transfer(_Start.apply(rows_RD, collective, flight), collective, flight)


class _Transfer(NamedTuple):
    """Rows under way: what ``_Arrive`` takes; the token ties it to ``_Start``."""

    token: Tensor
    collective: _Collective
    flight: "_Flight"

    def arrive(self) -> Tensor:
        return _Arrive.apply(self.token, self.collective, self.flight)


class _Flight:
    """An exchange under way; keeps what is sent alive until it has arrived."""

    def __init__(self) -> None:
        self._parts: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows_RD: Tensor, collective: _Collective) -> None:
        """Begin an exchange without waiting for it."""
        rows_RD = rows_RD.contiguous()
        work, received = collective.begin(rows_RD)
        self._parts = work, rows_RD, received

    def arrive(self) -> Tensor:
        """Wait until the rows are there (on a GPU: let the current stream wait), and hand them over."""
        assert self._parts is not None
        work, _, received = self._parts
        work.wait()
        self._parts = None
        return received


class _Start(torch.autograd.Function):
    """Begins the exchange; its output is a token of width 0 that ties ``_Arrive`` to it.

    In the backward pass it waits for the gradients that ``_Arrive`` has sent back. Autograd runs the backward
    pass of what was computed between the two between theirs: nodes that were made later go first.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, collective: _Collective, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.start(rows_RD, collective)
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight.arrive(), None, None


class _Arrive(torch.autograd.Function):
    """Waits for the rows. In the backward pass, begins the exchange of their gradients."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, collective: _Collective, flight: _Flight) -> Tensor:
        ctx.back, ctx.flight = collective.back, flight
        return flight.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.flight.start(grads[0], ctx.back)
        return grads[0].new_empty(0), None, None
