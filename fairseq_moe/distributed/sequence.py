"""Join tokens and widths between the ranks of a micro-batch, with gradients, over process groups.

The protocol is ``Shards`` in ``fairseq_moe.modules.shards``. Gathers and reduce-scatters are those of the exchange of
experts' rows; here is which ranks take part, and along which dimension.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe.distributed.all_to_all import GroupExchange
from fairseq_moe.distributed.mesh import ParallelMesh
from fairseq_moe.distributed.sharding import all_gather_stacked
from fairseq_moe.modules.shards import LocalShards, SequencePart, Shards

__all__ = ["GroupShards", "shards_of"]


def shards_of(mesh: ParallelMesh | None) -> Shards:
    """Make the ``Shards`` of a rank; local ones where no other rank reads the same micro-batches."""
    if mesh is None or mesh.num_batch_shards == 1:
        return LocalShards()
    return GroupShards(mesh)


class GroupShards:
    """Join what the context and tensor ranks of a micro-batch hold.

    Args:
        mesh: of the run, with more than one rank for each micro-batch.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        ranks = mesh.ranks
        self.context, self.tensor = ranks.context, ranks.tensor
        self.context_index = ranks.coordinate(mesh.rank, "context")
        self.tensor_index = ranks.coordinate(mesh.rank, "tensor")
        assert mesh.batch_shards is not None and mesh.context is not None and mesh.tensor is not None
        self._all, self._of_context, self._of_tensor = mesh.batch_shards, mesh.context, mesh.tensor
        self._exchange_of_context = GroupExchange(self._of_context)
        self._exchange_of_tensor = GroupExchange(self._of_tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupShards":
        return self  # process groups cannot be copied, and a copy of the model talks to the same ranks

    def part_of(self, length: int) -> SequencePart:
        """Find this rank's positions in sequences of this length."""
        return SequencePart(
            length=length,
            context=self.context,
            tensor=self.tensor,
            context_index=self.context_index,
            tensor_index=self.tensor_index,
        )

    def gather(self, x_BSD: Tensor) -> Tensor:
        """Gather the tokens of the tensor ranks; the gradient is a reduce-scatter."""
        if self.tensor == 1:
            return x_BSD
        return self._exchange_of_tensor.gather(x_BSD.transpose(0, 1)).arrive().transpose(0, 1)

    def project_back(self, linear: nn.Linear, y_BSN: Tensor) -> Tensor:
        """Apply a map whose inputs are spread over tensor, and add up and cut its outputs."""
        if self.tensor == 1:
            output: Tensor = linear(y_BSN)
            return output
        summed = self.scatter_sum(F.linear(y_BSN, linear.weight))
        return summed if linear.bias is None else summed + linear.bias

    def scatter_sum(self, x_BSD: Tensor) -> Tensor:
        """Add up what tensor ranks have and take this rank's tokens; the gradient is gathered."""
        if self.tensor == 1:
            return x_BSD
        return self._exchange_of_tensor.scatter_sum(x_BSD.transpose(0, 1)).arrive().transpose(0, 1)

    def gather_context(self, x: Tensor, *, dim: int) -> Tensor:
        """Gather what context ranks have, in the order of positions; the gradient is a reduce-scatter."""
        if self.context == 1:
            return x
        gathered = self._exchange_of_context.gather(x.movedim(dim, 0)).arrive()
        part = self.part_of(len(gathered))
        return part.in_order(list(gathered.chunk(self.context)), dim=0).movedim(0, dim)

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        """Add up what tensor ranks have; gradients are added up, too."""
        summed: Tensor = x if self.tensor == 1 else _SumBothWays.apply(x, self._of_tensor)
        return summed

    def stack_over_tensor(self, values: Tensor) -> Tensor:
        """Stack what tensor ranks have, without a gradient."""
        own = values.detach()
        return own.unsqueeze(0) if self.tensor == 1 else all_gather_stacked(own, self._of_tensor)

    def total(self, shares: Tensor) -> Tensor:
        """Add up shares over all ranks of the micro-batch; each share gets the gradient of the sum."""
        total: Tensor = _Total.apply(shares, self._all)
        return total

    def total_over_context(self, shares: Tensor) -> Tensor:
        """Add up shares over context ranks; each share gets the gradient of the sum."""
        total: Tensor = shares if self.context == 1 else _Total.apply(shares, self._of_context)
        return total

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Add up counts over all ranks of the micro-batch, in fresh memory."""
        summed = counts.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=self._all)
        return summed

    def gather_tokens(self, values_TN: Tensor) -> Tensor:
        """Gather rows of all ranks of the micro-batch, as many of each."""
        return all_gather_stacked(values_TN.detach(), self._all).flatten(0, 1)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: Tensor, group: Any) -> Tensor:
        total = shares.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        summed = x.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        summed = grads[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None
