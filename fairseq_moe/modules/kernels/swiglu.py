"""Gated linear units: SwiGLU (Shazeer 2020, arXiv 2002.05202), W2 (silu(Wg x) * (Wu x)), three matrices; and gpt-oss's.

fc1 holds the rows of Wg, then those of Wu, so its output is [gate | up].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ClampedSwiglu", "is_gated", "swiglu", "swiglu_backward"]


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


@dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """Compute (u + 1) * g * sigmoid(alpha * g), where g = min(gate, limit) and u is up, at least -limit, at most limit.

    Args:
        alpha: steepness of the sigmoid.
        limit: bound of both halves.
    """

    alpha: float
    limit: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """Apply to [gate | up]: (..., 2F) -> (..., F)."""
        gate, up = hidden.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))

    def backward(self, grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Pass a gradient back; beyond a bound it is 0, and at the bound that of the values within, as torch's is.

        Args:
            grad: float (..., F), gradient of the values.
            hidden: float (..., 2F), what they were computed from.

        Returns:
            the values, and the gradient of ``hidden``.
        """
        gate, up = hidden.chunk(2, dim=-1)
        held, raised = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1
        opened = torch.sigmoid(self.alpha * held)
        glu = held * opened
        # Of g sigmoid(alpha g): sigmoid + alpha g sigmoid (1 - sigmoid).
        slope = torch.addcmul(opened, self.alpha * glu, 1 - opened)
        grad_gate = torch.where(gate <= self.limit, grad * raised * slope, 0.0)
        grad_up = torch.where(up.abs() <= self.limit, grad * glu, 0.0)
        return raised * glu, torch.cat([grad_gate, grad_up], dim=-1)


def is_gated(activation: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether an activation makes F values of the 2F outputs of a first matrix, those of a gate first."""
    return activation is swiglu or isinstance(activation, ClampedSwiglu)
