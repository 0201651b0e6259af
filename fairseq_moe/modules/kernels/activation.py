"""Backward passes of the experts' activations, which keep the values before the activation and no others."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.modules.kernels.swiglu import swiglu, swiglu_backward

__all__ = ["Activation", "through_activation", "weighted_activation"]

Activation = Callable[[Tensor], Tensor]


def through_activation(
    activation: Activation, hidden: Tensor, active: Tensor | None, grad_active: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass a gradient back through the activation.

    Args:
        activation: elementwise, or ``swiglu``.
        hidden: values before it.
        active: values after it, where they were kept; None: they are computed again.
        grad_active: gradient of those.

    Returns:
        the values after the activation, and the gradient of ``hidden``.
    """
    # Autograd within a backward pass costs as much as a small product, so the usual ones are spelled out.
    if activation is F.gelu:
        active = F.gelu(hidden) if active is None else active
        return active, torch.ops.aten.gelu_backward(grad_active, hidden)
    if activation is F.relu:
        active = F.relu(hidden)
        return active, torch.ops.aten.threshold_backward(grad_active, active, 0)
    if activation is swiglu:
        return swiglu_backward(grad_active, hidden)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        active = activation(leaf)
    (grad_hidden,) = torch.autograd.grad(active, leaf, grad_active)
    return active.detach(), grad_hidden


def weighted_activation(activation: Activation, hidden_RF: Tensor, weights_R: Tensor) -> Tensor:
    """Multiply act(hidden) by each row's routing weight.

    That weights the expert's output, if it has no bias, and the output need not be kept for the gradient of the
    weights.
    """
    return _WeightedActivation.apply(hidden_RF, weights_R.to(hidden_RF.dtype), activation)


class _WeightedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RF: Tensor, weights_R: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(hidden_RF, weights_R)
        ctx.activation = activation
        return activation(hidden_RF) * weights_R.unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_RF, weights_R = ctx.saved_tensors
        with torch.autocast(hidden_RF.device.type, enabled=False):
            active, grad_hidden = through_activation(ctx.activation, hidden_RF, None, grads[0])
            return grad_hidden * weights_R.unsqueeze(1), torch.linalg.vecdot(grads[0], active), None
