"""Compute parts of a layer again in the backward pass, so that what they would keep takes no memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["RECOMPUTABLE", "recomputed", "recomputed_first"]

# Parts of an MoE layer, and what is computed again.
RECOMPUTABLE = {
    "moe": "the whole layer but the choice of experts, exchanges between ranks included",
    "experts": "the experts' networks",
    "shared_experts": "the network that every token passes",
}


def recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call ``function(*tensors)``, which runs once more, with the same random numbers, when gradients are wanted.

    Under FSDP a function may be run by a wrapped module; if it runs one itself, its output must pass
    ``recomputed_first``.

    Args:
        function: keeps the same tensors for its backward pass each time; gradients reach its parameters as usual.
        tensors: its arguments.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    # The other kind would finish the gradients of a wrapper's parameters before the rest of the wrapper is done.
    return checkpoint(function, *tensors, use_reentrant=False)


def recomputed_first(output: Tensor) -> Tensor:
    """Return the output, whose gradient waits until the function that made it has run again.

    FSDP prepares a wrapped module for its backward pass when the gradient of the module's output arrives. A
    recomputation that began only then, at the first operation that needs a kept tensor, would run that module forward
    once more in the midst of its backward pass.
    """
    return _RecomputedFirst.apply(output)


class _RecomputedFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.save_for_backward(output.new_empty(0))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _ = ctx.saved_tensors  # kept tensors of the function are asked for: it runs
        return grads[0]
