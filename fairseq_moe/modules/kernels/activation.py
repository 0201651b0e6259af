"""Apply the experts' activations, with bias and routing weight, and pass gradients back from the values before them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.fused import weighted_activation as fused
from fairseq_moe.fused.weighted_activation import ActivationKind, Clamp
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu, swiglu, swiglu_backward

__all__ = ["Activation", "activate", "activate_backward", "through_activation", "weigh_activation"]

Activation = Callable[[Tensor], Tensor]

# Those that run as one kernel on a GPU.
_KINDS: dict[Activation, ActivationKind] = {
    F.gelu: ActivationKind.GELU,
    F.relu: ActivationKind.RELU,
    swiglu: ActivationKind.SWIGLU,
}


def _kind(activation: Activation) -> tuple[ActivationKind | None, Clamp]:
    """Find the kernel of an activation, and its numbers; None: it has none."""
    if isinstance(activation, ClampedSwiglu):
        return ActivationKind.CLAMPED_SWIGLU, Clamp(activation.alpha, activation.limit)
    return _KINDS.get(activation), Clamp()


def through_activation(
    activation: Activation, hidden: Tensor, active: Tensor | None, grad_active: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass a gradient back through the activation.

    Args:
        activation: elementwise, or gated.
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
    if isinstance(activation, ClampedSwiglu):
        return activation.backward(grad_active, hidden)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        active = activation(leaf)
    (grad_hidden,) = torch.autograd.grad(active, leaf, grad_active)
    return active.detach(), grad_hidden


def weigh_activation(activation: Activation, hidden_RF: Tensor, weights_R: Tensor) -> Tensor:
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


def activate(
    activation: Activation,
    hidden_RH: Tensor,
    bias_LH: Tensor | None,
    expert_R: Tensor | None,
    weights_R: Tensor | None,
    num_rows: Tensor | None,
) -> Tensor:
    """Compute w act(hidden + bias) of each row's weight and expert, without a gradient: (R, H) -> (R, F).

    Args:
        activation: elementwise, or gated.
        hidden_RH: float.
        bias_LH: float, of the first matrix; None: no bias.
        expert_R: int64, each row's expert, with a bias.
        weights_R: float; None: 1.
        num_rows: int64 scalar on the device, rows that there are; None: all.
    """
    kind, clamp = _kind(activation)
    if kind is not None:
        return fused.weighted_activation(
            kind,
            hidden_RH,
            clamp=clamp,
            bias_LH=bias_LH,
            expert_R=expert_R,
            weights_R=weights_R,
            num_rows=num_rows,
        )
    active_RF = activation(_biased(hidden_RH, bias_LH, expert_R))
    return active_RF if weights_R is None else active_RF * weights_R.unsqueeze(1)


def activate_backward(
    activation: Activation,
    grad_RF: Tensor,
    hidden_RH: Tensor,
    bias_LH: Tensor | None,
    expert_R: Tensor | None,
    weights_R: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pass a gradient back through ``activate``.

    Args:
        activation: as there, as are the other arguments.
        grad_RF: float, gradient of the values.
        hidden_RH: what they were computed from.
        bias_LH: see there.
        expert_R: see there.
        weights_R: see there.
        num_rows: see there.

    Returns:
        the values, the gradient of ``hidden_RH``, and that of the weights, 0 in rows that are nobody's.
    """
    kind, clamp = _kind(activation)
    if kind is not None:
        return fused.weighted_activation_backward(
            kind,
            grad_RF,
            hidden_RH,
            clamp=clamp,
            bias_LH=bias_LH,
            expert_R=expert_R,
            weights_R=weights_R,
            num_rows=num_rows,
        )
    active_RF, grad_hidden_RH = through_activation(
        activation, _biased(hidden_RH, bias_LH, expert_R), None, grad_RF
    )
    if weights_R is None:
        return active_RF, grad_hidden_RH, None
    grad_weights_R = fused.zero_behind(torch.linalg.vecdot(grad_RF, active_RF), num_rows)
    weights_R1 = weights_R.unsqueeze(1)
    return active_RF * weights_R1, grad_hidden_RH * weights_R1, grad_weights_R


def _biased(hidden_RH: Tensor, bias_LH: Tensor | None, expert_R: Tensor | None) -> Tensor:
    if bias_LH is None or expert_R is None:
        return hidden_RH
    return hidden_RH + bias_LH.index_select(0, expert_R).to(hidden_RH.dtype)
