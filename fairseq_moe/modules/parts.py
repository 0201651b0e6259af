"""Take a part of a width or a vocabulary: which rows of a tensor it is made of."""

import torch
from torch import Tensor

__all__ = ["part_slices", "take_part"]


def part_slices(size: int, *, index: int, count: int, blocks: int = 1) -> list[slice]:
    """List the slices along one dimension that a part is made of, in order.

    Args:
        size: of the whole dimension.
        index: of the part.
        count: parts; where they cannot be equal, sizes differ by one.
        blocks: equal blocks of which each is divided: the part has its share of every one.
    """
    block = size // blocks
    first, end = block * index // count, block * (index + 1) // count
    return [slice(number * block + first, number * block + end) for number in range(blocks)]


def take_part(whole: Tensor, dim: int, *, index: int, count: int, blocks: int = 1) -> Tensor:
    """Cut a part out of a tensor along ``dim``, in fresh memory; further arguments as those of ``part_slices``."""
    slices = part_slices(whole.shape[dim], index=index, count=count, blocks=blocks)
    return torch.cat([whole.narrow(dim, each.start, each.stop - each.start) for each in slices], dim)
