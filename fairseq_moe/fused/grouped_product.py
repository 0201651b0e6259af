"""Multiply the rows of each expert with its matrix in one launch, with offsets on the device: grouped products.

torch's own ``grouped_mm`` does so in bfloat16 on recent GPUs, and is a loop with a wait for the device everywhere else.
Here the number of programs follows from shapes: every expert can leave one tile of rows partly empty, so R rows and L
experts make at most R / ROWS + L tiles, and a program looks up which expert its tile belongs to. Products are summed up
in float32; those of float32 itself are exact (``ieee``) unless torch may use TF32.

Block sizes are those that suit the tensor cores of sm_80 and later; they have not been tuned on a GPU yet.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, jit, runs_triton, tl

__all__ = ["RowTiles", "grouped_grad_rows", "grouped_grad_weight", "grouped_outputs", "row_tiles"]


@dataclass(frozen=True)
class _Blocks:
    """Sizes of a tile: rows, columns, and how much of the contraction is taken at once."""

    rows: int
    columns: int
    depth: int


_BLOCKS = {2: _Blocks(128, 128, 64), 4: _Blocks(64, 64, 32)}  # by the bytes of an element
_SMALL = _Blocks(16, 16, 16)  # for the tests' interpreter, which takes a millisecond for each program
_GROUP = 8  # tiles of rows that share the columns of a matrix while these are in the cache


@dataclass(frozen=True)
class RowTiles:
    """List, for all products of a layer, where each expert's rows and tiles end; on the device.

    Args:
        ends_L: int32, where each expert's rows end.
        tile_ends_L: int32, where its tiles of rows end.
        blocks: sizes of the tiles.
    """

    ends_L: Tensor
    tile_ends_L: Tensor
    blocks: _Blocks


def row_tiles(counts_L: Tensor, *, dtype: torch.dtype) -> RowTiles:
    """Cut each expert's rows into tiles, without a wait for the device.

    Args:
        counts_L: int64, rows of each expert.
        dtype: of the rows.
    """
    blocks = _BLOCKS[dtype.itemsize] if counts_L.is_cuda else _SMALL
    tiles_L = (counts_L + (blocks.rows - 1)) // blocks.rows
    ends_2L = torch.stack([counts_L, tiles_L]).cumsum(1).to(torch.int32)
    return RowTiles(ends_2L[0], ends_2L[1], blocks)


def grouped_outputs(x_RI: Tensor, weight_LOI: Tensor, tiles: RowTiles) -> Tensor:
    """Multiply forward: y = x W[l]^T, (R, I) -> (R, O); rows behind the last expert's are left as memory was.

    Args:
        x_RI: float32, float16 or bfloat16, sorted by expert.
        weight_LOI: of the same dtype.
        tiles: of the rows.
    """
    return _rows_product(x_RI, weight_LOI.transpose(1, 2), tiles)


def grouped_grad_rows(grad_RO: Tensor, weight_LOI: Tensor, tiles: RowTiles) -> Tensor:
    """Pass the gradient back to the rows: grad W[l], (R, O) -> (R, I); arguments as of ``grouped_outputs``."""
    return _rows_product(grad_RO, weight_LOI, tiles)


def _rows_product(x_RC: Tensor, weight_LCN: Tensor, tiles: RowTiles) -> Tensor:
    """Multiply rows with matrices of whatever strides: (R, C) x (L, C, N) -> (R, N)."""
    num_experts, depth, width = weight_LCN.shape
    if not runs_triton(x_RC, weight_LCN):
        return _rows_product_slowly(x_RC, weight_LCN, tiles.ends_L)
    x_RC = x_RC.contiguous()
    y_RN = x_RC.new_empty(len(x_RC), width)
    if y_RN.numel() == 0 or depth == 0:
        return y_RN.zero_()
    blocks = tiles.blocks
    num_tiles = cdiv(len(x_RC), blocks.rows) + num_experts
    _multiply_rows[(num_tiles * cdiv(width, blocks.columns),)](
        x_RC,
        weight_LCN,
        y_RN,
        tiles.ends_L,
        tiles.tile_ends_L,
        width,
        *weight_LCN.stride(),
        num_tiles,
        NUM_EXPERTS=num_experts,
        EXPERTS_BLOCK=block_of(num_experts),
        DEPTH=depth,
        **_options(x_RC, blocks),
    )
    return y_RN


def _options(x: Tensor, blocks: _Blocks) -> dict[str, Any]:
    """Choose what both kernels are compiled for."""
    return {
        # ``allow_tf32`` is the same answer, but raises an error where TF32 was allowed by ``fp32_precision``.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        # Values are converted before they are multiplied where Triton's interpreter takes bfloat16 for integers.
        "WIDEN": not x.is_cuda and x.dtype == torch.bfloat16,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "BLOCK": blocks.depth,
        "GROUP": _GROUP,
        "num_warps": 8 if blocks.rows == 128 else 4,
        "num_stages": 3,
    }


@jit
def _inner_tile_of(
    program: tl.tensor, num_down: tl.tensor, num_across: tl.tensor, GROUP: tl.constexpr
) -> tl.tensor:
    # Programs that follow one another take GROUP tiles of rows for each tile of columns: both stay in the cache.
    group = program // (GROUP * num_across)
    in_group = tl.minimum(num_down - group * GROUP, GROUP)
    within = program % (GROUP * num_across)
    return group * GROUP + within % in_group, within // in_group


@jit
def _multiply_rows(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    ends: tl.tensor,
    tile_ends: tl.tensor,
    width: tl.tensor,
    stride_expert: tl.tensor,
    stride_depth: tl.tensor,
    stride_width: tl.tensor,
    num_tiles: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    tile, column_tile = _inner_tile_of(tl.program_id(0), num_tiles, tl.cdiv(width, COLUMNS), GROUP)
    # The expert of a tile: so many experts' tiles end before it or with it.
    numbers = tl.arange(0, EXPERTS_BLOCK)
    ends_of_tiles = tl.load(tile_ends + numbers, mask=numbers < NUM_EXPERTS, other=2147483647)
    expert = tl.sum((ends_of_tiles <= tile).to(tl.int32), axis=0)
    if expert >= NUM_EXPERTS:
        return
    first_tile = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
    first_row = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    row = first_row + (tile - first_tile) * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    at_depth = tl.arange(0, BLOCK)
    x_at = x + row.to(tl.int64)[:, None] * DEPTH + at_depth[None, :]
    weight_at = weight + expert.to(tl.int64) * stride_expert
    weight_at = weight_at + at_depth[:, None] * stride_depth + column[None, :] * stride_width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(tl.cdiv(DEPTH, BLOCK)):
        deep = at_depth + step * BLOCK < DEPTH
        left = tl.load(x_at, mask=(row < end)[:, None] & deep[None, :], other=0.0)
        right = tl.load(weight_at, mask=deep[:, None] & (column < width)[None, :], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_at += BLOCK
        weight_at += BLOCK * stride_depth
    y_at = y + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(row < end)[:, None] & (column < width)[None, :])


def grouped_grad_weight(grad_RO: Tensor, x_RI: Tensor, tiles: RowTiles) -> Tensor:
    """Sum each expert's gradient of its matrix: grad^T x, (L, O, I); zeros for an expert without rows.

    Args:
        grad_RO: float32, float16 or bfloat16, sorted by expert.
        x_RI: of the same dtype.
        tiles: of the rows.
    """
    if not runs_triton(grad_RO, x_RI):
        return _grad_weight_slowly(grad_RO, x_RI, tiles.ends_L)
    grad_RO, x_RI = grad_RO.contiguous(), x_RI.contiguous()
    num_experts, height, width = len(tiles.ends_L), grad_RO.shape[1], x_RI.shape[1]
    grad_weight_LOI = x_RI.new_empty(num_experts, height, width)
    if grad_weight_LOI.numel() == 0:
        return grad_weight_LOI
    blocks = tiles.blocks
    grid = cdiv(height, blocks.rows) * cdiv(width, blocks.columns), num_experts
    _multiply_columns[grid](
        grad_RO,
        x_RI,
        grad_weight_LOI,
        tiles.ends_L,
        height,
        width,
        **_options(x_RI, blocks),
    )
    return grad_weight_LOI


@jit
def _multiply_columns(
    grad: tl.tensor,
    x: tl.tensor,
    grad_weight: tl.tensor,
    ends: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    tile, column_tile = _inner_tile_of(
        tl.program_id(0), tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS), GROUP
    )
    expert = tl.program_id(1)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    out_row = tile * ROWS + tl.arange(0, ROWS)
    out_column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        long_row = row.to(tl.int64)
        left_at = grad + long_row[None, :] * height + out_row[:, None]
        right_at = x + long_row[:, None] * width + out_column[None, :]
        left = tl.load(left_at, mask=(row < end)[None, :] & (out_row < height)[:, None], other=0.0)
        right = tl.load(right_at, mask=(row < end)[:, None] & (out_column < width)[None, :], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    at = grad_weight + (expert.to(tl.int64) * height + out_row)[:, None] * width + out_column[None, :]
    inside = (out_row < height)[:, None] & (out_column < width)[None, :]
    tl.store(at, total.to(grad_weight.dtype.element_ty), mask=inside)


def _rows_product_slowly(x_RC: Tensor, weight_LCN: Tensor, ends_L: Tensor) -> Tensor:
    """Multiply rows with matrices in plain torch, expert by expert; waits for the device."""
    y_RN = x_RC.new_zeros(len(x_RC), weight_LCN.shape[2])
    start = 0
    for matrix_CN, end in zip(weight_LCN, ends_L.tolist(), strict=True):
        y_RN[start:end] = x_RC[start:end] @ matrix_CN
        start = end
    return y_RN


def _grad_weight_slowly(grad_RO: Tensor, x_RI: Tensor, ends_L: Tensor) -> Tensor:
    """Sum the gradients of the matrices in plain torch, expert by expert; waits for the device."""
    ends = ends_L.tolist()
    starts = [0, *ends[:-1]]
    parts = [grad_RO[start:end].t() @ x_RI[start:end] for start, end in zip(starts, ends, strict=True)]
    return torch.stack(parts)
