"""Gated linear units: SwiGLU (Shazeer 2020, arXiv 2002.05202), W2 (silu(Wg x) * (Wu x)), three matrices.

fc1 holds the rows of Wg, then those of Wu, so its output is [gate | up].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["swiglu", "swiglu_backward"]


def swiglu(hidden: Tensor) -> Tensor:
    """Compute silu(gate) * up of [gate | up]: (..., 2F) -> (..., F)."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Pass a gradient back through ``swiglu``.

    Args:
        grad: float (..., F), gradient of its values.
        hidden: float (..., 2F), what it was given.

    Returns:
        its values, and the gradient of ``hidden``.
    """
    gate, up = hidden.chunk(2, dim=-1)
    opened = F.silu(gate)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return opened * up, torch.cat([grad_gate, grad * opened], dim=-1)
