"""Add up the rows of each token (combine, and the gradient of taking rows), and pass gradients back to the rows.

y[t] = sum over k of w[r] * rows[r], r = row_TK[t, k], for a token's choices that have a row. Sums are taken in float32,
choices in order, so they are the same in every run.
"""

import torch
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, jit, runs_triton, tl

__all__ = ["add_rows", "add_rows_slowly", "spread_rows", "spread_rows_slowly"]

_BLOCK_D = 1024


def add_rows(rows_RD: Tensor, row_TK: Tensor, *, weights_R: Tensor | None = None) -> Tensor:
    """Sum each token's rows, times their weights.

    Args:
        rows_RD: float32, float16 or bfloat16.
        row_TK: int64, the row of each of a token's choices; -1 where it has none.
        weights_R: float; None: 1.

    Returns:
        (T, D), in the dtype of the rows; zeros for a token without rows.
    """
    if not runs_triton(rows_RD):
        return add_rows_slowly(rows_RD, row_TK, weights_R=weights_R)
    rows_RD, row_TK = rows_RD.contiguous(), row_TK.contiguous()
    weights_R = None if weights_R is None else weights_R.contiguous()
    num_tokens, top_k = row_TK.shape
    width = rows_RD.shape[1]
    y_TD = rows_RD.new_empty(num_tokens, width)
    if num_tokens * width == 0:
        return y_TD
    block = block_of(width, most=_BLOCK_D)
    _add_rows[(num_tokens, cdiv(width, block))](
        rows_RD, row_TK, weights_R, y_TD, width, HAS_WEIGHTS=weights_R is not None, K=top_k, BLOCK_D=block
    )
    return y_TD


@jit
def _add_rows(
    rows: tl.tensor,
    row_of: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    width: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of + token * K + k)
        # A choice without a row reads no memory: its mask is empty.
        values = tl.load(rows + row * width + column, mask=column < tl.where(row < 0, 0, width), other=0.0)
        values = values.to(tl.float32)
        if HAS_WEIGHTS:
            values *= tl.load(weights + row, mask=row >= 0, other=0.0).to(tl.float32)
        total += tl.where(row < 0, 0.0, values)
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), mask=column < width)


def add_rows_slowly(rows_RD: Tensor, row_TK: Tensor, *, weights_R: Tensor | None = None) -> Tensor:
    """Compute ``add_rows`` in plain torch, with all the rows of all tokens in memory."""
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    num_tokens, top_k = row_TK.shape
    if len(rows_RD) == 0:
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[1])
    index = row_TK.clamp(min=0).reshape(-1)
    taken_TKD = rows_RD.index_select(0, index).to(dtype).view(num_tokens, top_k, rows_RD.shape[1])
    if weights_R is not None:
        taken_TKD = taken_TKD * weights_R.index_select(0, index).to(dtype).view(num_tokens, top_k, 1)
    return taken_TKD.masked_fill((row_TK < 0).unsqueeze(-1), 0.0).sum(1).to(rows_RD.dtype)


def spread_rows(
    grad_TD: Tensor, token_R: Tensor, rows_RD: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass a gradient of ``add_rows`` back to rows and weights, both in one pass.

    Args:
        grad_TD: float, of the sums.
        token_R: int64, the token of each row.
        rows_RD: float, the rows that were added.
        weights_R: float, their weights.

    Returns:
        (R, D) and (R,), gradients in the dtypes of rows and weights.
    """
    if not runs_triton(rows_RD):
        return spread_rows_slowly(grad_TD, token_R, rows_RD, weights_R)
    rows_RD, grad_TD = rows_RD.contiguous(), grad_TD.contiguous()
    token_R, weights_R = token_R.contiguous(), weights_R.contiguous()
    num_rows, width = rows_RD.shape
    grad_rows_RD, grad_weights_R = torch.empty_like(rows_RD), torch.empty_like(weights_R)
    if num_rows * width == 0:
        return grad_rows_RD, grad_weights_R.zero_()
    block = block_of(width, most=_BLOCK_D)
    _spread_rows[(num_rows,)](
        grad_TD,
        token_R,
        rows_RD,
        weights_R,
        grad_rows_RD,
        grad_weights_R,
        width,
        BLOCKS=cdiv(width, block),
        BLOCK_D=block,
    )
    return grad_rows_RD, grad_weights_R


@jit
def _spread_rows(
    grad: tl.tensor,
    token_of: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    grad_rows: tl.tensor,
    grad_weights: tl.tensor,
    width: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_of + row)
    weight = tl.load(weights + row).to(tl.float32)
    products = tl.zeros((BLOCK_D,), tl.float32)
    for block in tl.static_range(BLOCKS):
        column = block * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < width
        upper = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
        products += upper * tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            grad_rows + row * width + column, (upper * weight).to(grad_rows.dtype.element_ty), mask=inside
        )
    tl.store(grad_weights + row, tl.sum(products).to(grad_weights.dtype.element_ty))


def spread_rows_slowly(
    grad_TD: Tensor, token_R: Tensor, rows_RD: Tensor, weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``spread_rows`` in plain torch."""
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    grad_RD = grad_TD.index_select(0, token_R).to(dtype)
    grad_rows_RD = grad_RD * weights_R.to(dtype).unsqueeze(1)
    grad_weights_R = (grad_RD * rows_RD.to(dtype)).sum(1)
    return grad_rows_RD.to(rows_RD.dtype), grad_weights_R.to(weights_R.dtype)
