"""Apply an activation to hidden values with bias and routing weight, and pass gradients back, each in one pass.

Forward, a[r] = w[r] act(h[r] + b[e(r)]). Backward reads h and the gradient g of a once and writes three things: a
again, which fc2's gradient needs and nobody kept; the gradient of h, w g act'(h + b); and that of w, the sum over a
row of g act(h + b). In plain torch that is a dozen passes, and torch.compile makes two kernels of the backward one. On
one H200 (2026-11-27) whole layers (T, D, F, E, K) with it, and with kernels such as these, ran at 343 and 377 TFLOPS
(16384, 2048, 768, 128, 8), 168 and 191 (24576, 1536, 256, 128, 8), 337 and 434 (16384, 2048, 1408, 64, 6), 505 and 602
(32768, 4096, 14336, 8, 2).
"""

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, jit, runs_triton, tl

__all__ = [
    "ActivationKind",
    "weighted_activation",
    "weighted_activation_backward",
    "weighted_activation_backward_slowly",
    "weighted_activation_slowly",
    "zero_behind",
]

# Values of a program: 16 for each of 128 threads, so that loads are of 16 bytes and several are under way at once. 256
# columns in half precision are the 512 bytes of one row that a warp reads at once. Seen in what triton 3.9 compiles for
# sm_90, for widths that 16 divides: loads and stores of rows are of 16 bytes, no register is spilled. Not timed.
_TILE = 2048
_BLOCKS_F = (512, 256)


class ActivationKind(StrEnum):
    """Name the activations that have kernels; gelu is the exact one, swiglu is silu(gate) * up of [gate | up]."""

    GELU = "gelu"
    RELU = "relu"
    SWIGLU = "swiglu"


def weighted_activation(
    kind: ActivationKind,
    hidden_RH: Tensor,
    *,
    bias_LH: Tensor | None = None,
    expert_R: Tensor | None = None,
    weights_R: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """Compute w act(h + b) for each row.

    Args:
        kind: the activation; H is 2F for ``swiglu`` and F for the others.
        hidden_RH: float32, float16 or bfloat16.
        bias_LH: float, of each expert; None: no bias.
        expert_R: int64, the expert of each row, where there is a bias.
        weights_R: float, of each row; None: 1.
        num_rows: int64 scalar on the device, rows that there are; None: all. The values behind them are arbitrary.

    Returns:
        (R, F), in the dtype of ``hidden_RH``.
    """
    if not runs_triton(hidden_RH):
        return weighted_activation_slowly(
            kind, hidden_RH, bias_LH=bias_LH, expert_R=expert_R, weights_R=weights_R
        )
    hidden_RH, bias_LH, expert_R, weights_R = _contiguous(hidden_RH, bias_LH, expert_R, weights_R)
    total, width = len(hidden_RH), _width(kind, hidden_RH)
    active_RF = hidden_RH.new_empty(total, width)
    if total * width == 0:
        return active_RF
    block, rows = _tile(width)
    _activate[(cdiv(total, rows), cdiv(width, block))](
        hidden_RH,
        bias_LH,
        expert_R,
        weights_R,
        num_rows,
        active_RF,
        total,
        width,
        KIND=str(kind),
        HAS_BIAS=bias_LH is not None,
        HAS_WEIGHTS=weights_R is not None,
        IS_COUNTED=num_rows is not None,
        ROWS=rows,
        BLOCK_F=block,
    )
    return active_RF


def weighted_activation_backward(
    kind: ActivationKind,
    grad_RF: Tensor,
    hidden_RH: Tensor,
    *,
    bias_LH: Tensor | None = None,
    expert_R: Tensor | None = None,
    weights_R: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pass the gradient of ``weighted_activation`` back; its arguments are those, and ``grad_RF`` is of its values.

    Returns:
        the values again, (R, F); the gradient of ``hidden_RH``; and that of ``weights_R`` (None without weights), which
        is 0 behind ``num_rows``, where the other two are arbitrary.
    """
    if not runs_triton(hidden_RH):
        return weighted_activation_backward_slowly(
            kind,
            grad_RF,
            hidden_RH,
            bias_LH=bias_LH,
            expert_R=expert_R,
            weights_R=weights_R,
            num_rows=num_rows,
        )
    hidden_RH, bias_LH, expert_R, weights_R = _contiguous(hidden_RH, bias_LH, expert_R, weights_R)
    grad_RF = grad_RF.contiguous()
    total, width = len(hidden_RH), _width(kind, hidden_RH)
    active_RF, grad_hidden_RH = hidden_RH.new_empty(total, width), torch.empty_like(hidden_RH)
    grad_weights_R = None if weights_R is None else torch.empty_like(weights_R)
    if total * width == 0:
        return active_RF, grad_hidden_RH, None if grad_weights_R is None else grad_weights_R.zero_()
    block, rows = _tile(width)
    # A program has whole rows, so that the sum over a row needs no second kernel and no atomic addition, and is the
    # same in every run. Programs are many still: 16384 for 131072 rows of F 768 (8 each) and 65536 of 14336 (4).
    _activate_backward[(cdiv(total, rows),)](
        grad_RF,
        hidden_RH,
        bias_LH,
        expert_R,
        weights_R,
        num_rows,
        active_RF,
        grad_hidden_RH,
        grad_weights_R,
        total,
        width,
        KIND=str(kind),
        HAS_BIAS=bias_LH is not None,
        HAS_WEIGHTS=weights_R is not None,
        IS_COUNTED=num_rows is not None,
        ROWS=rows,
        BLOCKS=cdiv(width, block),
        BLOCK_F=block,
    )
    return active_RF, grad_hidden_RH, grad_weights_R


def _width(kind: ActivationKind, hidden_RH: Tensor) -> int:
    return hidden_RH.shape[1] // (2 if kind is ActivationKind.SWIGLU else 1)


def _contiguous(
    hidden_RH: Tensor, bias_LH: Tensor | None, expert_R: Tensor | None, weights_R: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Copy those whose values do not lie one behind the other, as kernels expect of all."""
    bias_LH, expert_R, weights_R = (
        None if values is None else values.contiguous() for values in (bias_LH, expert_R, weights_R)
    )
    return hidden_RH.contiguous(), bias_LH, expert_R, weights_R


def _tile(width: int) -> tuple[int, int]:
    """Choose columns and rows of a program: the block that leaves fewer columns idle (768 is no multiple of 512)."""
    block = min(
        (block_of(width, most=most) for most in _BLOCKS_F), key=lambda block: cdiv(width, block) * block
    )
    return block, _TILE // block


@jit
def _inner_activate(hidden: tl.tensor, up: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Compute the activation, its derivative by ``hidden`` and, for swiglu, by ``up``."""
    if KIND == "gelu":
        # cdf and density of the standard normal distribution.
        below = 0.5 * (1.0 + tl.erf(hidden * 0.7071067811865476))
        active = hidden * below
        slope = below + hidden * 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
        slope_up = slope
    elif KIND == "relu":
        # Not by a maximum, which makes a number of NaN: whoever looks for overflows must find them.
        active = tl.where(hidden <= 0.0, 0.0, hidden)
        slope = tl.where(hidden <= 0.0, 0.0, 1.0)
        slope_up = slope
    else:
        opened = tl.sigmoid(hidden)
        slope_up = hidden * opened
        active = slope_up * up
        slope = up * opened * (1.0 + hidden * (1.0 - opened))
    return active, slope, slope_up


@jit
def _inner_load(
    source: tl.tensor, at: tl.tensor, width: tl.tensor, inside: tl.tensor, KIND: tl.constexpr
) -> tl.tensor:
    """Load what the activation is of and, for swiglu, what it is multiplied by; else the same again."""
    values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    up = values
    if KIND == "swiglu":
        up = tl.load(source + at + width, mask=inside, other=0.0).to(tl.float32)
    return values, up


@jit
def _activate(
    hidden: tl.tensor,
    bias: tl.tensor,
    expert_of: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    active: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    hidden_width = width * 2 if KIND == "swiglu" else width
    last = tl.load(num_rows).to(tl.int32) if IS_COUNTED else total
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (row < last)[:, None] & (column < width)[None, :]
    long_row = row.to(tl.int64)[:, None]
    at = long_row * hidden_width + column[None, :]
    values, up = _inner_load(hidden, at, width, inside, KIND)
    if HAS_BIAS:
        expert = tl.load(expert_of + row, mask=row < last, other=0).to(tl.int64)[:, None]
        bias_values, bias_up = _inner_load(bias, expert * hidden_width + column[None, :], width, inside, KIND)
        values += bias_values
        up += bias_up
    result, _slope, _slope_up = _inner_activate(values, up, KIND)
    if HAS_WEIGHTS:
        result *= tl.load(weights + row, mask=row < last, other=0.0).to(tl.float32)[:, None]
    tl.store(active + long_row * width + column[None, :], result.to(active.dtype.element_ty), mask=inside)


@jit
def _activate_backward(
    grad: tl.tensor,
    hidden: tl.tensor,
    bias: tl.tensor,
    expert_of: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    active: tl.tensor,
    grad_hidden: tl.tensor,
    grad_weights: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    hidden_width = width * 2 if KIND == "swiglu" else width
    last = tl.load(num_rows).to(tl.int32) if IS_COUNTED else total
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    long_row = row.to(tl.int64)[:, None]
    weight = tl.full((ROWS, 1), 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights + row, mask=row < last, other=0.0).to(tl.float32)[:, None]
    expert = tl.zeros((ROWS, 1), tl.int64)
    if HAS_BIAS:
        expert = tl.load(expert_of + row, mask=row < last, other=0).to(tl.int64)[:, None]
    products = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for block in range(BLOCKS):
        column = block * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = long_row * hidden_width + column[None, :]
        values, up = _inner_load(hidden, at, width, inside, KIND)
        if HAS_BIAS:
            bias_at = expert * hidden_width + column[None, :]
            bias_values, bias_up = _inner_load(bias, bias_at, width, inside, KIND)
            values += bias_values
            up += bias_up
        result, slope, slope_up = _inner_activate(values, up, KIND)
        narrow_at = long_row * width + column[None, :]
        upper = tl.load(grad + narrow_at, mask=inside, other=0.0).to(tl.float32)
        products += upper * result
        tl.store(active + narrow_at, (result * weight).to(active.dtype.element_ty), mask=inside)
        upper *= weight
        tl.store(grad_hidden + at, (upper * slope).to(grad_hidden.dtype.element_ty), mask=inside)
        if KIND == "swiglu":
            tl.store(
                grad_hidden + at + width, (upper * slope_up).to(grad_hidden.dtype.element_ty), mask=inside
            )
    if HAS_WEIGHTS:
        # Rows that are nobody's were read as zeros.
        sums = tl.sum(products, axis=1)
        tl.store(grad_weights + row, sums.to(grad_weights.dtype.element_ty), mask=row < total)


def weighted_activation_slowly(
    kind: ActivationKind,
    hidden_RH: Tensor,
    *,
    bias_LH: Tensor | None = None,
    expert_R: Tensor | None = None,
    weights_R: Tensor | None = None,
) -> Tensor:
    """Compute ``weighted_activation`` in plain torch."""
    active_RF = _plain(kind, _biased(hidden_RH, bias_LH, expert_R))
    if weights_R is not None:
        active_RF = active_RF * weights_R.to(active_RF.dtype).unsqueeze(1)
    return active_RF.to(hidden_RH.dtype)


def weighted_activation_backward_slowly(
    kind: ActivationKind,
    grad_RF: Tensor,
    hidden_RH: Tensor,
    *,
    bias_LH: Tensor | None = None,
    expert_R: Tensor | None = None,
    weights_R: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute ``weighted_activation_backward`` in plain torch, by autograd."""
    with torch.enable_grad():
        leaf_RH = _biased(hidden_RH, bias_LH, expert_R).detach().requires_grad_()
        active_RF = _plain(kind, leaf_RH)
    upper_RF = grad_RF.to(active_RF.dtype)
    (grad_hidden_RH,) = torch.autograd.grad(active_RF, leaf_RH, upper_RF)
    active_RF, grad_weights_R = active_RF.detach(), None
    if weights_R is not None:
        grad_weights_R = torch.linalg.vecdot(upper_RF, active_RF).to(weights_R.dtype)
        grad_weights_R = zero_behind(grad_weights_R, num_rows)
        weights_R1 = weights_R.to(active_RF.dtype).unsqueeze(1)
        active_RF, grad_hidden_RH = active_RF * weights_R1, grad_hidden_RH * weights_R1
    return active_RF.to(hidden_RH.dtype), grad_hidden_RH.to(hidden_RH.dtype), grad_weights_R


def zero_behind(values_R: Tensor, num_rows: Tensor | None) -> Tensor:
    """Replace by 0 what stands behind the rows that there are, without a wait for the device.

    Args:
        values_R: float, one of each row.
        num_rows: int64 scalar on the device; None: all rows.
    """
    if num_rows is None:
        return values_R
    return values_R.masked_fill(torch.arange(len(values_R), device=values_R.device) >= num_rows, 0.0)


def _biased(hidden_RH: Tensor, bias_LH: Tensor | None, expert_R: Tensor | None) -> Tensor:
    wide_RH = hidden_RH.to(torch.promote_types(hidden_RH.dtype, torch.float32))
    if bias_LH is None or expert_R is None:
        return wide_RH
    return wide_RH + bias_LH.to(wide_RH.dtype).index_select(0, expert_R)


def _plain(kind: ActivationKind, hidden_RH: Tensor) -> Tensor:
    if kind is ActivationKind.GELU:
        return F.gelu(hidden_RH)
    if kind is ActivationKind.RELU:
        return F.relu(hidden_RH)
    gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF
