"""The experts one after the other, each from its rows to its outputs while they are in the cache.

Nothing of size R x F is touched twice from memory: of the hidden layer only the values before the activation
are kept for the backward pass, one block per expert, and the activation is computed again there. One exception:
where half precision has units of its own, GELU is dear beside the products, and its values are kept, too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.modules.gated import swiglu, swiglu_backward
from fairseq_moe.modules.kernels_linear import Gradients, addmm_into, mm_into

__all__ = ["sliced_network"]


class _Plan(NamedTuple):
    """What is not differentiated.

    Args:
        counts_L: rows of each expert.
        activation: of the hidden layer; its values may be fewer (``swiglu``).
        wide: dtype of the products.
        keeps_active: keep the values after the activation, too.
    """

    counts_L: tuple[int, ...]
    activation: Callable[[Tensor], Tensor]
    wide: torch.dtype
    keeps_active: bool


def sliced_network(
    rows_RD: Tensor,
    stacks: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    counts_L: tuple[int, ...],
    *,
    activation: Callable[[Tensor], Tensor],
    wide: torch.dtype,
) -> Tensor:
    """W2 act(W1 x (+ b1)) (+ b2) of each row's expert; products are taken in ``wide``."""
    keeps_active = activation is F.gelu and wide.itemsize < 4
    plan = _Plan(counts_L, activation, wide, keeps_active)
    return _SlicedNetwork.apply(rows_RD, *stacks, plan)


class _SlicedNetwork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, *args: Any) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, plan = args
        wide, counts = plan.wide, plan.counts_L
        out_RD = rows_RD.new_empty((len(rows_RD), fc2_weight.shape[1]))
        kept = []
        for x, y, w1, b1, w2, b2 in zip(
            rows_RD.split(counts),
            out_RD.split(counts),
            fc1_weight,
            _slices(fc1_bias, counts),
            fc2_weight,
            _slices(fc2_bias, counts),
            strict=True,
        ):
            hidden = _linear(b1, x.to(wide), w1.to(wide))
            active = plan.activation(hidden)
            addmm_into(y, b2, active, w2.to(wide).t())
            kept.append(hidden.to(rows_RD.dtype))
            if plan.keeps_active:
                kept.append(active)
        ctx.save_for_backward(rows_RD, fc1_weight, fc2_weight, *kept)
        ctx.plan = plan
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        rows_RD, fc1_weight, fc2_weight, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        wide, counts = plan.wide, plan.counts_L
        grad_RD = grads[0].contiguous()
        into = _Gradients.empty(ctx.needs_input_grad, rows_RD, fc1_weight, fc2_weight, plan)
        slices = into.slices(counts)
        hidden_of_L = kept[:: 2 if plan.keeps_active else 1]
        active_of_L = kept[1::2] if plan.keeps_active else [None] * len(counts)
        with torch.autocast(rows_RD.device.type, enabled=False):
            for x, grad, w1, w2, hidden, active, to in zip(
                rows_RD.split(counts),
                grad_RD.split(counts),
                fc1_weight,
                fc2_weight,
                hidden_of_L,
                active_of_L,
                slices,
                strict=True,
            ):
                grad = grad.to(wide)
                active, grad_hidden = _through_activation(
                    plan.activation, hidden.to(wide), active, torch.mm(grad, w2.to(wide))
                )
                _linear_gradients(to.fc2_weight, to.fc2_bias, grad, active)
                _linear_gradients(to.fc1_weight, to.fc1_bias, grad_hidden, x.to(wide))
                if to.rows is not None:
                    mm_into(to.rows, grad_hidden, w1.to(wide))
        return (*into, None)


def _slices(bias_LO: Tensor | None, counts_L: tuple[int, ...]) -> Sequence[Tensor | None]:
    return [None] * len(counts_L) if bias_LO is None else bias_LO.unbind()


def _linear(bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())


def _through_activation(
    activation: Callable[[Tensor], Tensor], hidden: Tensor, active: Tensor | None, grad_active: Tensor
) -> tuple[Tensor, Tensor]:
    """The activation's values, computed unless they were kept, and the gradient before it."""
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


def _linear_gradients(weight: Tensor | None, bias: Tensor | None, grad: Tensor, x: Tensor) -> None:
    if weight is not None:
        mm_into(weight, grad.t(), x)
    if bias is not None:
        bias.copy_(grad.sum(0))


class _Gradients(NamedTuple):
    """Of the inputs, in their order; None where nobody asked."""

    rows: Tensor | None
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None

    @classmethod
    def empty(
        cls, wanted: tuple[bool, ...], rows_RD: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, plan: _Plan
    ) -> "_Gradients":
        """Every slice will be written once."""
        return cls(
            torch.empty_like(rows_RD, memory_format=torch.contiguous_format) if wanted[0] else None,
            torch.empty_like(fc1_weight) if wanted[1] else None,
            fc1_weight.new_empty(fc1_weight.shape[:2]) if wanted[2] else None,
            torch.empty_like(fc2_weight) if wanted[3] else None,
            fc2_weight.new_empty(fc2_weight.shape[:2]) if wanted[4] else None,
        )

    def slices(self, counts_L: tuple[int, ...]) -> "list[_Gradients]":
        """The part of each expert."""
        nothing = [None] * len(counts_L)
        rows = nothing if self.rows is None else self.rows.split(counts_L)
        stacks = (nothing if stack is None else stack.unbind() for stack in self[1:])
        return [_Gradients(*parts) for parts in zip(rows, *stacks, strict=True)]
