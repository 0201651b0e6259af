"""Computing parts of a layer again in the backward pass, so that what they would keep takes no memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["RECOMPUTABLE", "recomputed"]

# Parts of an MoE layer, and what is computed again.
RECOMPUTABLE = {
    "moe": "the whole layer but the choice of experts, exchanges between ranks included",
    "experts": "the experts' networks",
    "shared_experts": "the network that every token passes",
}


def recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """``function(*tensors)``, which runs once more, with the same random numbers, when gradients are wanted.

    Under FSDP a function may run a wrapped module whole, or be run by one; it must not hold one whose parameters
    are needed while it runs again.

    Args:
        function: keeps the same tensors for its backward pass each time; gradients reach its parameters as usual.
        tensors: its arguments.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    # The other kind would finish the gradients of a wrapper's parameters before the rest of the wrapper is done.
    return checkpoint(function, *tensors, use_reentrant=False)
