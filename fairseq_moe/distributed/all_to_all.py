"""Exchange rows between the ranks that share a layer's experts, with gradients: all-to-all over a process group.

The protocol is ``Exchange`` in ``fairseq_moe.modules.dispatch.exchange``.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_moe.modules.dispatch.exchange import Transfer

__all__ = ["GroupExchange"]


class GroupExchange:
    """all-to-all over a process group of more than one rank."""

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
        flight = _Flight()
        token = _Start.apply(rows_RD, send_splits, recv_splits, self._group, flight)
        return _Transfer(token, (send_splits, recv_splits, self._group, flight))


class _Transfer(NamedTuple):
    """Rows under way: what ``_Arrive`` takes.

    Args:
        token: ties it to ``_Start``.
        call: both splits, the group and the flight.
    """

    token: Tensor
    call: tuple[list[int], list[int], dist.ProcessGroup, "_Flight"]

    def arrive(self) -> Tensor:
        return _Arrive.apply(self.token, *self.call)


class _Flight:
    """An exchange under way; keeps what is sent alive until it has arrived."""

    def __init__(self) -> None:
        self._parts: tuple[Any, Tensor, Tensor] | None = None

    def start(
        self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup
    ) -> None:
        """Begin an exchange without waiting for it."""
        rows_RD = rows_RD.contiguous()
        received = rows_RD.new_empty((sum(recv_splits), *rows_RD.shape[1:]))
        work = dist.all_to_all_single(received, rows_RD, recv_splits, send_splits, group=group, async_op=True)
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
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        group: dist.ProcessGroup,
        flight: _Flight,
    ) -> Tensor:
        ctx.flight = flight
        flight.start(rows_RD, send_splits, recv_splits, group)
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.flight.arrive(), None, None, None, None


class _Arrive(torch.autograd.Function):
    """Waits for the rows. In the backward pass, begins the exchange of their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        group: dist.ProcessGroup,
        flight: _Flight,
    ) -> Tensor:
        ctx.splits, ctx.group, ctx.flight = (send_splits, recv_splits), group, flight
        return flight.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        send_splits, recv_splits = ctx.splits
        ctx.flight.start(grads[0], recv_splits, send_splits, ctx.group)
        return grads[0].new_empty(0), None, None, None, None
