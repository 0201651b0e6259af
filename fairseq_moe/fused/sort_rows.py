"""Sort assignments by expert with a counting sort, and number the row that each becomes.

An assignment is a (token, choice) pair. Kept ones stand expert by expert, in the order of tokens and of a token's
choices within an expert; those that were dropped stand behind them, in order. Blocks of assignments count their
experts, a prefix sum over (expert, block) says where each block's part of each expert ends, and within a block every
assignment counts those of its expert behind it. No atomic operation hands out rows, so every run has the same order.
"""

import torch
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, jit, runs_triton, tl

__all__ = ["sort_assignments", "sort_assignments_slowly"]

# Guesses, not measured on a GPU. A block's assignments are compared with one another, and counts are kept per block.
_BLOCK_A = 512
_TILE_A = 32
_BLOCK_E = 128


def sort_assignments(ids_TK: Tensor, kept_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort assignments by expert, stably, the dropped ones last.

    Args:
        ids_TK: int64, the expert of each of a token's choices.
        kept_TK: bool, assignments that were not dropped.
        num_experts: E.

    Returns:
        int64 (A,), the assignment in each row, and int64 (T, K), the row of each assignment, -1 where it was dropped.
    """
    if not runs_triton(ids_TK):
        return sort_assignments_slowly(ids_TK, kept_TK, num_experts=num_experts)
    ids_TK, kept_TK = ids_TK.contiguous(), kept_TK.contiguous().view(torch.uint8)
    num_assignments, num_blocks = ids_TK.numel(), cdiv(ids_TK.numel(), _BLOCK_A)
    assignment_A, row_TK = ids_TK.new_empty(num_assignments), torch.empty_like(ids_TK)
    if num_assignments == 0:
        return assignment_A, row_TK
    num_bins = num_experts + 1  # the last one takes what was dropped
    block = block_of(num_bins, most=_BLOCK_E)
    counts = torch.empty(num_bins * num_blocks, dtype=torch.int32, device=ids_TK.device)
    _count_bins[(num_blocks, cdiv(num_bins, block))](
        ids_TK,
        kept_TK,
        counts,
        num_assignments,
        num_blocks,
        num_experts,
        TILES=_BLOCK_A // _TILE_A,
        TILE_A=_TILE_A,
        BLOCK_E=block,
    )
    ends = counts.cumsum(0)
    _place_assignments[(num_blocks, _BLOCK_A // _TILE_A)](
        ids_TK,
        kept_TK,
        ends,
        assignment_A,
        row_TK,
        num_assignments,
        num_blocks,
        num_experts,
        TILES=_BLOCK_A // _TILE_A,
        TILE_A=_TILE_A,
    )
    return assignment_A, row_TK


@jit
def _inner_bins_of(
    ids: tl.tensor, kept: tl.tensor, assignment: tl.tensor, num_assignments: tl.tensor, num_experts: tl.tensor
) -> tl.tensor:
    """Load the bins of assignments: their experts, E for those that were dropped, -1 behind the last assignment."""
    inside = assignment < num_assignments
    expert = tl.load(ids + assignment, mask=inside, other=0).to(tl.int32)
    is_kept = tl.load(kept + assignment, mask=inside, other=0)
    bins = tl.where(is_kept != 0, expert, num_experts)
    return tl.where(inside, bins, -1)


@jit
def _count_bins(
    ids: tl.tensor,
    kept: tl.tensor,
    counts: tl.tensor,
    num_assignments: tl.tensor,
    num_blocks: tl.tensor,
    num_experts: tl.tensor,
    TILES: tl.constexpr,
    TILE_A: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for tile in range(TILES):
        assignment = (block * TILES + tile) * TILE_A + tl.arange(0, TILE_A)
        bins = _inner_bins_of(ids, kept, assignment, num_assignments, num_experts)
        total += tl.sum((bins[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts + expert * num_blocks + block, total, mask=expert <= num_experts)


@jit
def _place_assignments(
    ids: tl.tensor,
    kept: tl.tensor,
    ends: tl.tensor,
    assignment_of: tl.tensor,
    row_of: tl.tensor,
    num_assignments: tl.tensor,
    num_blocks: tl.tensor,
    num_experts: tl.tensor,
    TILES: tl.constexpr,
    TILE_A: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    assignment = (block * TILES + tl.program_id(1)) * TILE_A + tl.arange(0, TILE_A)
    bins = _inner_bins_of(ids, kept, assignment, num_assignments, num_experts)
    behind = tl.zeros((TILE_A,), tl.int32)
    for tile in range(TILES):
        other = (block * TILES + tile) * TILE_A + tl.arange(0, TILE_A)
        other_bins = _inner_bins_of(ids, kept, other, num_assignments, num_experts)
        same = (bins[:, None] == other_bins[None, :]) & (other[None, :] > assignment[:, None])
        behind += tl.sum(same.to(tl.int32), axis=1)
    inside = assignment < num_assignments
    end = tl.load(ends + bins * num_blocks + block, mask=inside, other=0)
    row = end - 1 - behind
    tl.store(assignment_of + row, assignment.to(tl.int64), mask=inside)
    tl.store(row_of + assignment, tl.where(bins == num_experts, -1, row), mask=inside)


def sort_assignments_slowly(ids_TK: Tensor, kept_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """Compute ``sort_assignments`` by a stable sort in plain torch."""
    bins_A = ids_TK.masked_fill(~kept_TK, num_experts).reshape(-1)
    assignment_A = torch.argsort(bins_A, stable=True)
    rows_A = torch.arange(len(bins_A), device=bins_A.device)
    row_TK = torch.empty_like(assignment_A).scatter_(0, assignment_A, rows_A).view(ids_TK.shape)
    return assignment_A, row_TK.masked_fill(~kept_TK, -1)
