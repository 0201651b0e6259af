"""Moving rows between the ranks that share a layer's experts, with gradients.

The exchange that ``fairseq_moe.modules.exchange`` describes, as all-to-all over a process group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GroupExchange"]


class GroupExchange:
    """all-to-all over a process group of more than one rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size = dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupExchange":
        return self  # a process group cannot be copied, and a copy of the model talks to the same ranks

    def counts(self, send_counts_GL: Tensor) -> Tensor:
        """All-to-all of one (L,) row per rank."""
        received = torch.empty_like(send_counts_GL)
        dist.all_to_all_single(received, send_counts_GL.contiguous(), group=self._group)
        return received

    def rows(self, rows_RD: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        """All-to-all with uneven splits; its gradient travels the other way round."""
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
