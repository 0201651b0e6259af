"""What every kernel is given: the experts' parameters, the shape of their network, and how many rows each has."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.kernels.activation import Activation

__all__ = ["KernelFunction", "Network", "Stacks", "device_counts", "under_autocast"]


class Stacks(NamedTuple):
    """Parameters of L experts: (L, F, D), (L, F), (L, D, F), (L, D); fc1 of gated ones has 2F rows.

    Experts without biases have None in their places.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


class Network(NamedTuple):
    """dropout(W2 activation_dropout(act(W1 x (+ b1))) (+ b2)): all of it but its parameters.

    Args:
        activation: of each row, not in place, without parameters; elementwise or gated.
        activation_dropout: probability, on the activation's values; 0 outside training.
        dropout: probability, on the outputs; 0 outside training.
        wide: dtype of the products, at least as wide as that of the rows.
        fp8: name of the way in which products are computed in FP8 (``fp8.Fp8Mode``); None: they are not.
    """

    activation: Activation
    activation_dropout: float
    dropout: float
    wide: torch.dtype
    fp8: str | None = None


KernelFunction = Callable[[Tensor, Stacks, ExpertWork, Network], Tensor]
"""Computes the network of each row's expert, and adds the outputs up where the work says: (S, D) -> (S, D).

The rows have the dtype of the parameters, and autocast is off. An expert without rows gets zero gradients.
"""


def under_autocast(source_SD: Tensor, stacks: Stacks) -> tuple[Tensor, Stacks]:
    """Convert rows and parameters to autocast's dtype where it is on: torch itself converts for no kernel."""
    device = source_SD.device.type
    if not torch.is_autocast_enabled(device):
        return source_SD, stacks
    dtype = torch.get_autocast_dtype(device)
    fc1_bias, fc2_bias = (None if b is None else b.to(dtype) for b in (stacks.fc1_bias, stacks.fc2_bias))
    fc1_weight, fc2_weight = stacks.fc1_weight.to(dtype), stacks.fc2_weight.to(dtype)
    return source_SD.to(dtype), Stacks(fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def device_counts(work: ExpertWork, device: torch.device) -> Tensor:
    """Count the rows of each local expert: int64 (L,) on ``device``, for kernels that need no number on the host."""
    if isinstance(work.counts_L, Tensor):
        return work.counts_L
    counts_L = torch.tensor(work.host_counts(), dtype=torch.int64, pin_memory=device.type == "cuda")
    return counts_L.to(device, non_blocking=True)
