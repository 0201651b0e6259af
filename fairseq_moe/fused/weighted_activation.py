"""Apply an activation to hidden values with bias and routing weight, and pass gradients back, each in one pass.

Forward, a[r] = w[r] act(h[r] + b[e(r)]). Backward reads h and the gradient g of a once and writes three things: a
again, which fc2's gradient needs and nobody kept; the gradient of h, w g act'(h + b); and that of w, the sum over a
row of g act(h + b). In plain torch that is a dozen passes, and torch.compile makes two kernels of the backward one. On
one H200 (2026-11-27) whole layers (T, D, F, E, K) with it, and with kernels such as these, ran at 343 and 377 TFLOPS
(16384, 2048, 768, 128, 8), 168 and 191 (24576, 1536, 256, 128, 8), 337 and 434 (16384, 2048, 1408, 64, 6), 505 and 602
(32768, 4096, 14336, 8, 2).
"""

from enum import StrEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused.launch import block_of, cdiv, runs_triton
from fairseq_moe.fused.weighted_activation_kernels import activate, activate_backward

__all__ = [
    "ActivationKind",
    "Clamp",
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
    """Name the activations that have kernels; gelu is the exact one, swiglu is silu(gate) * up of [gate | up].

    clamped_swiglu is (u + 1) * g * sigmoid(alpha * g), where g = min(gate, limit) and u is up within +-limit (gpt-oss).
    """

    GELU = "gelu"
    RELU = "relu"
    SWIGLU = "swiglu"
    CLAMPED_SWIGLU = "clamped_swiglu"

    @property
    def is_gated(self) -> bool:
        """Tell whether it makes F values of 2F."""
        return self in (ActivationKind.SWIGLU, ActivationKind.CLAMPED_SWIGLU)


class Clamp(NamedTuple):
    """Hold the two numbers of ``clamped_swiglu``; no other activation has them."""

    alpha: float = 0.0
    limit: float = 0.0


_NO_CLAMP = Clamp()


def weighted_activation(
    kind: ActivationKind,
    hidden_RH: Tensor,
    *,
    clamp: Clamp = _NO_CLAMP,
    bias_LH: Tensor | None = None,
    expert_R: Tensor | None = None,
    weights_R: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """Compute w act(h + b) for each row.

    Args:
        kind: the activation; H is 2F for gated ones and F for the others.
        hidden_RH: float32, float16 or bfloat16.
        clamp: the numbers of ``clamped_swiglu``.
        bias_LH: float, of each expert; None: no bias.
        expert_R: int64, the expert of each row, where there is a bias.
        weights_R: float, of each row; None: 1.
        num_rows: int64 scalar on the device, rows that there are; None: all. The values behind them are arbitrary.

    Returns:
        (R, F), in the dtype of ``hidden_RH``.
    """
    if not runs_triton(hidden_RH):
        return weighted_activation_slowly(
            kind, hidden_RH, clamp=clamp, bias_LH=bias_LH, expert_R=expert_R, weights_R=weights_R
        )
    hidden_RH, bias_LH, expert_R, weights_R = _contiguous(hidden_RH, bias_LH, expert_R, weights_R)
    total, width = len(hidden_RH), _width(kind, hidden_RH)
    active_RF = hidden_RH.new_empty(total, width)
    if total * width == 0:
        return active_RF
    block, rows = _tile(width)
    activate[(cdiv(total, rows), cdiv(width, block))](
        hidden_RH,
        bias_LH,
        expert_R,
        weights_R,
        num_rows,
        active_RF,
        total,
        width,
        clamp.alpha,
        clamp.limit,
        KIND=str(kind),
        IS_GATED=kind.is_gated,
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
    clamp: Clamp = _NO_CLAMP,
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
            clamp=clamp,
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
    activate_backward[(cdiv(total, rows),)](
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
        clamp.alpha,
        clamp.limit,
        KIND=str(kind),
        IS_GATED=kind.is_gated,
        HAS_BIAS=bias_LH is not None,
        HAS_WEIGHTS=weights_R is not None,
        IS_COUNTED=num_rows is not None,
        ROWS=rows,
        BLOCKS=cdiv(width, block),
        BLOCK_F=block,
    )
    return active_RF, grad_hidden_RH, grad_weights_R


def _width(kind: ActivationKind, hidden_RH: Tensor) -> int:
    return hidden_RH.shape[1] // (2 if kind.is_gated else 1)


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


def weighted_activation_slowly(
    kind: ActivationKind,
    hidden_RH: Tensor,
    *,
    clamp: Clamp = _NO_CLAMP,
    bias_LH: Tensor | None = None,
    expert_R: Tensor | None = None,
    weights_R: Tensor | None = None,
) -> Tensor:
    """Compute ``weighted_activation`` in plain torch."""
    active_RF = _plain(kind, _biased(hidden_RH, bias_LH, expert_R), clamp)
    if weights_R is not None:
        active_RF = active_RF * weights_R.to(active_RF.dtype).unsqueeze(1)
    return active_RF.to(hidden_RH.dtype)


def weighted_activation_backward_slowly(
    kind: ActivationKind,
    grad_RF: Tensor,
    hidden_RH: Tensor,
    *,
    clamp: Clamp = _NO_CLAMP,
    bias_LH: Tensor | None = None,
    expert_R: Tensor | None = None,
    weights_R: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute ``weighted_activation_backward`` in plain torch, by autograd."""
    with torch.enable_grad():
        leaf_RH = _biased(hidden_RH, bias_LH, expert_R).detach().requires_grad_()
        active_RF = _plain(kind, leaf_RH, clamp)
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


def _plain(kind: ActivationKind, hidden_RH: Tensor, clamp: Clamp) -> Tensor:
    if kind is ActivationKind.GELU:
        return F.gelu(hidden_RH)
    if kind is ActivationKind.RELU:
        return F.relu(hidden_RH)
    gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
    if kind is ActivationKind.SWIGLU:
        return F.silu(gate_RF) * up_RF
    gate_RF, up_RF = gate_RF.clamp(max=clamp.limit), up_RF.clamp(-clamp.limit, clamp.limit)
    return (up_RF + 1) * (gate_RF * torch.sigmoid(clamp.alpha * gate_RF))
