"""Add each row its expert's bias, times the row's routing weight, in place."""

import torch
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, jit, runs_triton, tl

__all__ = ["add_bias_", "add_bias_slowly_"]

_BLOCK_D = 1024


def add_bias_(
    rows_RD: Tensor,
    bias_LD: Tensor,
    expert_R: Tensor,
    *,
    weights_R: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """Add w[r] * bias[expert_R[r]] to each row r, in place.

    Args:
        rows_RD: float32, float16 or bfloat16.
        bias_LD: float.
        expert_R: int64, the expert of each row.
        weights_R: float; None: 1.
        num_rows: int64 scalar on the device, rows that there are; None: all.

    Returns:
        ``rows_RD``.
    """
    if not runs_triton(rows_RD) or not rows_RD.is_contiguous():
        return add_bias_slowly_(rows_RD, bias_LD, expert_R, weights_R=weights_R)
    total, width = rows_RD.shape
    if total * width == 0:
        return rows_RD
    block = block_of(width, most=_BLOCK_D)
    _add_bias[(total, cdiv(width, block))](
        rows_RD,
        bias_LD.contiguous(),
        expert_R.contiguous(),
        None if weights_R is None else weights_R.contiguous(),
        num_rows,
        width,
        HAS_WEIGHTS=weights_R is not None,
        IS_COUNTED=num_rows is not None,
        BLOCK_D=block,
    )
    return rows_RD


@jit
def _add_bias(
    rows: tl.tensor,
    bias: tl.tensor,
    expert_of: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    IS_COUNTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    # Rows that are nobody's are left alone.
    width_here = tl.where(row < tl.load(num_rows), width, 0) if IS_COUNTED else width
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width_here
    added = tl.load(bias + tl.load(expert_of + row) * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHTS:
        added *= tl.load(weights + row).to(tl.float32)
    values = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(rows + row * width + column, (values + added).to(rows.dtype.element_ty), mask=inside)


def add_bias_slowly_(
    rows_RD: Tensor, bias_LD: Tensor, expert_R: Tensor, *, weights_R: Tensor | None = None
) -> Tensor:
    """Compute ``add_bias_`` in plain torch, rows that are nobody's included."""
    added_RD = bias_LD.to(torch.promote_types(rows_RD.dtype, torch.float32)).index_select(0, expert_R)
    if weights_R is not None:
        added_RD = added_RD * weights_R.to(added_RD.dtype).unsqueeze(1)
    return rows_RD.add_(added_RD)
