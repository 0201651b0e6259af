"""Join the parts of a parameter that ranks hold along some axes, and cut a whole one into them.

The first dimension of a stack of experts is not joined: files name experts by their global ids.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fairseq_moe.distributed.mesh import ParallelMesh
from fairseq_moe.distributed.sharding import all_gather_stacked
from fairseq_moe.modules.parts import part_slices, take_part
from fairseq_moe.parallel.placement import Cut, Placement

__all__ = ["cut_part", "is_part", "join_parts", "part_shape", "whole_numel"]


def _cuts(placement: Placement, mesh: ParallelMesh) -> Iterator[tuple[Cut, int]]:
    for cut in placement.cuts:
        count = mesh.ranks.size([cut.axis])
        if cut.axis != "expert" and count > 1:
            yield cut, count


def is_part(placement: Placement, mesh: ParallelMesh) -> bool:
    """Tell whether a rank holds a part of such a parameter, its experts apart."""
    return any(_cuts(placement, mesh))


def join_parts(part: Tensor, placement: Placement, mesh: ParallelMesh) -> Tensor:
    """Join a tensor that is cut like a parameter of this placement; collective, for all ranks of its axes alike."""
    whole = part.detach()
    for cut, count in _cuts(placement, mesh):
        first = whole.movedim(cut.dim, 0)
        group = mesh.groups_by_axes[(cut.axis,)]
        if cut.size is not None:
            lengths = [_length(cut, index, count) for index in range(count)]
            filler = first.new_zeros(max(lengths) - len(first), *first.shape[1:])
            gathered = all_gather_stacked(torch.cat([first, filler]), group)
            joined = torch.cat([one[:length] for one, length in zip(gathered, lengths, strict=True)])
        else:
            gathered = all_gather_stacked(first, group)
            # (part, block, share) -> (block, part, share)
            by_block = gathered.view(count, cut.blocks, len(first) // cut.blocks, *first.shape[1:])
            joined = by_block.transpose(0, 1).reshape(count * len(first), *first.shape[1:])
        whole = joined.movedim(0, cut.dim).contiguous()
    return whole


def cut_part(whole: Tensor, placement: Placement, mesh: ParallelMesh) -> Tensor:
    """Cut this rank's part out of a whole tensor."""
    for cut, count in _cuts(placement, mesh):
        index = mesh.ranks.coordinate(mesh.rank, cut.axis)
        whole = take_part(whole, cut.dim, index=index, count=count, blocks=cut.blocks)
    return whole


def part_shape(shape: tuple[int, ...], placement: Placement, mesh: ParallelMesh) -> tuple[int, ...]:
    """Find the shape of a part of a tensor of this shape; a dimension that cannot be cut so is left as it is."""
    found = list(shape)
    for cut, count in _cuts(placement, mesh):
        if cut.dim >= len(found):
            continue
        if found[cut.dim] == cut.size:
            found[cut.dim] = _length(cut, mesh.ranks.coordinate(mesh.rank, cut.axis), count)
        elif cut.size is None and found[cut.dim] % count == 0:
            found[cut.dim] //= count
    return tuple(found)


def whole_numel(numel: int, placement: Placement, mesh: ParallelMesh) -> int:
    """Count the elements of the whole tensor from those of a part."""
    for cut, count in _cuts(placement, mesh):
        if cut.size is None:
            numel *= count
        else:
            numel = numel // _length(cut, mesh.ranks.coordinate(mesh.rank, cut.axis), count) * cut.size
    return numel


def _length(cut: Cut, index: int, count: int) -> int:
    """Count the rows of a part whose cut names the size of the whole."""
    assert cut.size is not None
    (rows,) = part_slices(cut.size, index=index, count=count)
    return rows.stop - rows.start
