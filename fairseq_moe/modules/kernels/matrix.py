"""Multiply one matrix in place, rounded once: the product behind every kernel that goes expert by expert."""

import torch
from torch import Tensor

__all__ = ["Gradients", "affine", "mm_into"]

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
