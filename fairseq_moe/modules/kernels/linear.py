"""Three ways to multiply the rows of each expert with its matrix, y = x W[l]^T (+ b[l]); all gradients are equal.

Each is an autograd function of its own, because autograd's own gradient of a slice of a stack is a stack of
zeros with one slice filled: here every slice is written once, where it belongs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from fairseq_moe.modules.kernels import cpu_memory

__all__ = ["affine", "batched_linear", "grouped_linear", "loop_linear", "mm_into"]

Gradients = tuple[Tensor | None, ...]


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write the product a b into ``out``, rounded to its dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """Compute x W^T (+ b) in the dtype of ``x``; ``out`` gets it, too, rounded to its own dtype."""
    into = out if out is not None and out.dtype == x.dtype else None
    weight = weight.t()
    y = torch.mm(x, weight, out=into) if bias is None else torch.addmm(bias.to(x.dtype), x, weight, out=into)
    if out is not None and into is None:
        out.copy_(y)
    return y


def loop_linear(
    x_RI: Tensor,
    weight_LOI: Tensor,
    bias_LO: Tensor | None,
    counts_L: tuple[int, ...],
    *,
    wide: torch.dtype,
) -> Tensor:
    """Multiply expert after expert; products are taken in ``wide``."""
    return _LoopLinear.apply(x_RI, weight_LOI, bias_LO, counts_L, wide)


class _LoopLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        weight_LOI: Tensor,
        bias_LO: Tensor | None,
        counts_L: tuple[int, ...],
        wide: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_LOI)
        ctx.counts_L, ctx.wide = counts_L, wide
        y_RO = x_RI.new_empty((x_RI.shape[0], weight_LOI.shape[1]))
        for expert, (x, y) in enumerate(zip(x_RI.split(counts_L), y_RO.split(counts_L), strict=True)):
            bias = None if bias_LO is None else bias_LO[expert]
            affine(x.to(wide), weight_LOI[expert].to(wide), bias, out=y)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x_RI, weight_LOI = ctx.saved_tensors
        counts_L, wide = ctx.counts_L, ctx.wide
        grad_RO = grads[0].contiguous()
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x_RI = torch.empty_like(x_RI) if wants_x else None
        grad_weight_LOI = cpu_memory.empty(weight_LOI.shape, like=weight_LOI) if wants_weight else None
        grad_bias_LO = weight_LOI.new_empty(weight_LOI.shape[:2]) if wants_bias else None
        start = 0
        for expert, count in enumerate(counts_L):
            rows = slice(start, start + count)
            start += count
            grad = grad_RO[rows].to(wide)
            if grad_weight_LOI is not None:
                mm_into(grad_weight_LOI[expert], grad.t(), x_RI[rows].to(wide))
            if grad_bias_LO is not None:
                grad_bias_LO[expert] = grad.sum(0)
            if grad_x_RI is not None:
                mm_into(grad_x_RI[rows], grad, weight_LOI[expert].to(wide))
        return grad_x_RI, grad_weight_LOI, grad_bias_LO, None, None


def batched_linear(
    x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None, counts_L: tuple[int, ...]
) -> Tensor:
    """Multiply all experts at once; their rows are padded with zeros to the busiest one's, unless all have as many."""
    size = max(counts_L)
    if min(counts_L) == size:
        y_LCO = _BatchedLinear.apply(x_RI.reshape(len(counts_L), size, x_RI.shape[1]), weight_LOI, bias_LO)
        return y_LCO.reshape(len(x_RI), weight_LOI.shape[1])
    x_LCI = pad_sequence(list(x_RI.split(counts_L)), batch_first=True)
    y_LCO = _BatchedLinear.apply(x_LCI, weight_LOI, bias_LO)
    return torch.cat([y_LCO[expert, :count] for expert, count in enumerate(counts_L)])


class _BatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LCI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_LCI, weight_LOI)
        if bias_LO is None:
            return torch.bmm(x_LCI, weight_LOI.transpose(1, 2))
        return torch.baddbmm(bias_LO.unsqueeze(1), x_LCI, weight_LOI.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x_LCI, weight_LOI = ctx.saved_tensors
        grad_LCO = grads[0].contiguous()
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        with torch.autocast(x_LCI.device.type, enabled=False):
            return (
                torch.bmm(grad_LCO, weight_LOI) if wants_x else None,
                torch.bmm(grad_LCO.transpose(1, 2), x_LCI) if wants_weight else None,
                grad_LCO.sum(1) if wants_bias else None,
            )


def grouped_linear(x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None, counts_L: Tensor) -> Tensor:
    """Multiply all experts at once by torch's ``grouped_mm``: not in float64, and rows of a multiple of 16 bytes.

    ``counts_L`` is int64, on the device of the rows: nothing waits for it on the host.
    """
    groups_R = torch.repeat_interleave(
        torch.arange(len(counts_L), device=x_RI.device), counts_L, output_size=len(x_RI)
    )
    return _GroupedLinear.apply(x_RI, weight_LOI, bias_LO, counts_L.cumsum(0).to(torch.int32), groups_R)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None, ends_L: Tensor, groups_R: Tensor
    ) -> Tensor:
        x_RI = x_RI.contiguous()
        ctx.save_for_backward(x_RI, weight_LOI, ends_L, groups_R)
        y_RO = F.grouped_mm(x_RI, weight_LOI.transpose(1, 2), offs=ends_L)
        return y_RO if bias_LO is None else y_RO.add_(bias_LO.index_select(0, groups_R))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x_RI, weight_LOI, ends_L, groups_R = ctx.saved_tensors
        grad_RO = grads[0].contiguous()  # grouped_mm refuses expanded gradients
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(x_RI.device.type, enabled=False):
            if wants_x:
                grad_x = F.grouped_mm(grad_RO, weight_LOI, offs=ends_L)
            if wants_weight:
                grad_weight = F.grouped_mm(grad_RO.t(), x_RI, offs=ends_L)
            if wants_bias:
                # A product with one row per group: the same sum in every run, which adding by index is not.
                is_member_LR = groups_R == torch.arange(len(weight_LOI), device=x_RI.device).unsqueeze(1)
                grad_bias = is_member_LR.to(grad_RO.dtype) @ grad_RO
        return grad_x, grad_weight, grad_bias, None, None
