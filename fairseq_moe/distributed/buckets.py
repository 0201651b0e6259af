"""Sum many tensors over ranks with few collectives."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["sum_in_buckets"]

# Elements of a bucket: those of stock's legacy_ddp.
_BUCKET_NUMEL = 2**28


def sum_in_buckets(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None, *, bucket_numel: int = _BUCKET_NUMEL
) -> None:
    """Sum each tensor over ``group``, in place; tensors of one dtype and device travel together.

    Args:
        tensors: of the same shapes, in the same order, on every rank.
        group: of ranks.
        bucket_numel: the most elements that travel together; a larger tensor travels alone.
    """
    for bucket in _buckets(tensors, bucket_numel):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(
            bucket, [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)]
        )


def _buckets(tensors: Sequence[Tensor], bucket_numel: int) -> Iterator[list[Tensor]]:
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in by_kind.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in same:
            if bucket and size + tensor.numel() > bucket_numel:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.numel()
        yield bucket
