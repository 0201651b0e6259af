"""Quantise rows, or columns, of a matrix to e4m3 (FP8) with one scale each: values = x / scale, scale = max |x| / 448.

Rounding is to the nearest value, ties to even; e4m3 has 3 bits of mantissa, so a value is off by at most a sixteenth of
itself, or by 2^-10 of its scale where it is among the smallest. A row of zeros has scale 1; no scale is below 1e-37, so
that every finite row stays finite. What is not finite is not finite afterwards either.
"""

import torch
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, jit, runs_triton, tl

__all__ = ["LARGEST", "quantize_columns", "quantize_rows", "quantize_rows_slowly"]

LARGEST = 448.0  # of e4m3
_LEAST_SCALE = 1e-37  # near the smallest float32 whose inverse is one
_BLOCK = 1024
_TILE = 64


def quantize_rows(x_RI: Tensor, *, num_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise each row with a scale of its own.

    Args:
        x_RI: float32, float16 or bfloat16.
        num_rows: int64 scalar on the device, rows that there are; None: all. What stands behind them is arbitrary.

    Returns:
        float8_e4m3fn (R, I), and float32 (R,) scales.
    """
    if not runs_triton(x_RI):
        return quantize_rows_slowly(x_RI)
    x_RI = x_RI.contiguous()
    total, width = x_RI.shape
    codes_RI = torch.empty(total, width, dtype=torch.uint8, device=x_RI.device)
    scales_R = torch.ones(total, dtype=torch.float32, device=x_RI.device)
    if total * width > 0:
        block = block_of(width, most=_BLOCK)
        _quantize_rows[(total,)](
            x_RI,
            codes_RI if _by_bits(x_RI) else codes_RI.view(torch.float8_e4m3fn),
            scales_R,
            num_rows,
            width,
            IS_COUNTED=num_rows is not None,
            BY_BITS=_by_bits(x_RI),
            BLOCKS=cdiv(width, block),
            BLOCK=block,
        )
    return codes_RI.view(torch.float8_e4m3fn), scales_R


def _by_bits(x: Tensor) -> bool:
    """Whether kernels put the bits together: older GPUs have no e4m3, and Triton's interpreter rounds to it wrongly."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9)


@jit
def _inner_scale(largest: tl.tensor) -> tl.tensor:
    """Choose the scale of rows from their largest values; ``div_rn`` rounds as torch does."""
    return tl.where(largest > 0.0, tl.maximum(tl.div_rn(largest, 448.0), 1e-37), 1.0)


@jit
def _inner_codes(x: tl.tensor, scale: tl.tensor, BY_BITS: tl.constexpr) -> tl.tensor:
    """Scale float32 values and round them to e4m3."""
    # One division per scale; a product with the inverse is rounded alike everywhere.
    values = tl.clamp(x * tl.div_rn(1.0, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if BY_BITS:
        size = tl.abs(values)
        bits = size.to(tl.int32, bitcast=True)
        # 20 bits of the mantissa go; the exponent's bias of 127 becomes 7.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        # Below 2^-6 values are multiples of 2^-9; adding 2^23 rounds to a whole number of them.
        small = ((size * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
        code = tl.where(size < 0.015625, small, tl.where(values == values, normal, 127))
        result = tl.where(values < 0.0, code + 128, code).to(tl.uint8)
    else:
        result = values.to(tl.float8e4nv)
    return result


@jit
def _quantize_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    IS_COUNTED: tl.constexpr,
    BY_BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(num_rows) if IS_COUNTED else row + 1
    if row >= last:
        return
    largest = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    scale = _inner_scale(tl.max(largest, axis=0))
    tl.store(scales + row, scale)
    # The row is read again, from the cache.
    for block in range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(codes + row * width + column, _inner_codes(values, scale, BY_BITS), mask=column < width)


def quantize_columns(weight_LOI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each column of each expert's matrix, and lay the columns out as rows.

    Args:
        weight_LOI: float32, float16 or bfloat16.

    Returns:
        float8_e4m3fn (L, I, O), contiguous, and float32 (L, I) scales.
    """
    num_experts, height, width = weight_LOI.shape
    if not runs_triton(weight_LOI):
        values, scales = quantize_rows_slowly(weight_LOI.transpose(1, 2).reshape(-1, height))
        return values.view(num_experts, width, height), scales.view(num_experts, width)
    weight_LOI = weight_LOI.contiguous()
    codes_LIO = torch.empty(num_experts, width, height, dtype=torch.uint8, device=weight_LOI.device)
    scales_LI = torch.ones(num_experts, width, dtype=torch.float32, device=weight_LOI.device)
    if codes_LIO.numel() > 0:
        _quantize_columns[(num_experts, cdiv(width, _TILE))](
            weight_LOI,
            codes_LIO if _by_bits(weight_LOI) else codes_LIO.view(torch.float8_e4m3fn),
            scales_LI,
            height,
            width,
            BY_BITS=_by_bits(weight_LOI),
            TILE=_TILE,
        )
    return codes_LIO.view(torch.float8_e4m3fn), scales_LI


@jit
def _quantize_columns(
    weight: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    BY_BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    expert = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    matrix = weight + expert * height * width
    largest = tl.zeros((TILE, TILE), tl.float32)
    for start in tl.range(0, height, TILE):
        row = (start + tl.arange(0, TILE)).to(tl.int64)
        inside = (row < height)[:, None] & (column < width)[None, :]
        values = tl.load(matrix + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
    scale = _inner_scale(tl.max(largest, axis=0))
    tl.store(scales + expert * width + column, scale, mask=column < width)
    for start in tl.range(0, height, TILE):
        row = start + tl.arange(0, TILE)
        inside = (row < height)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        values = tl.load(matrix + at, mask=inside, other=0.0).to(tl.float32)
        to = codes + (expert * width + column)[:, None] * height + row[None, :]
        inside_to = (column < width)[:, None] & (row < height)[None, :]
        tl.store(to, _inner_codes(tl.trans(values), scale[:, None], BY_BITS), mask=inside_to)


def quantize_rows_slowly(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``quantize_rows`` in plain torch."""
    wide_RI = x_RI.float()
    largest_R = wide_RI.abs().amax(1) if wide_RI.numel() > 0 else wide_RI.new_zeros(len(wide_RI))
    scales_R = torch.where(largest_R > 0, (largest_R / LARGEST).clamp(min=_LEAST_SCALE), 1.0)
    values_RI = (wide_RI * (1 / scales_R).unsqueeze(1)).clamp(-LARGEST, LARGEST)
    return values_RI.to(torch.float8_e4m3fn), scales_R
