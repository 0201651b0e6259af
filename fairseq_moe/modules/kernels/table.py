"""Which code computes the experts: one table, from the device, the dtype and sizes, never from anyone's data.

========= =======================================================================================
kernel    how
========= =======================================================================================
sliced    expert after expert, fc1, activation and fc2 in one go, so that a slice stays in the cache
loop      expert after expert, but all of fc1 before all of fc2: leaves room for activation dropout
bmm       one batched product per matrix; rows padded to the busiest expert unless all have as many
grouped   one ``torch.nn.functional.grouped_mm`` per matrix
========= =======================================================================================

Routing weights, where the rows have them, are applied between activation and fc2 if the experts have no biases, and
else to the outputs, which are then kept for the weights' gradient. ``sliced`` keeps no outputs in any case.

All compute the same function and the same gradients, so a checkpoint knows nothing of them. An expert without
rows gets zero gradients, not missing ones: optimizers and reductions see the same tensors on every rank.
"""

import functools
import math
from enum import StrEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.rows import ExpertWork, combine_rows, take_rows
from fairseq_moe.modules.kernels.activation import Activation, weighted_activation
from fairseq_moe.modules.kernels.linear import batched_linear, grouped_linear, loop_linear
from fairseq_moe.modules.kernels.sliced import sliced_network

__all__ = ["Kernel", "Stacks", "arithmetic_dtype", "choose_kernel", "run_experts", "under_autocast"]

_GROUPED_ALIGNMENT_BYTES = 16  # of every row, or grouped_mm refuses
_GROUPED_CAPABILITY = (9, 0)  # below it grouped_mm is itself a loop, with a host synchronisation per call
# One batched product spares the calls of a loop, and pays with slices that have left the cache.
_SMALL_EXPERT_FLOPS = 4_000_000


class Kernel(StrEnum):
    """See the table of this module."""

    SLICED = "sliced"
    LOOP = "loop"
    BMM = "bmm"
    GROUPED = "grouped"


class Stacks(NamedTuple):
    """Parameters of L experts: (L, F, D), (L, F), (L, D, F), (L, D); fc1 of gated ones has 2F rows.

    Experts without biases have None in their places.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


def under_autocast(rows_RD: Tensor, stacks: Stacks) -> tuple[Tensor, Stacks]:
    """Rows and parameters in autocast's dtype where it is on; no kernel is converted by torch itself."""
    device = rows_RD.device.type
    if not torch.is_autocast_enabled(device):
        return rows_RD, stacks
    dtype = torch.get_autocast_dtype(device)
    fc1_bias, fc2_bias = (None if b is None else b.to(dtype) for b in (stacks.fc1_bias, stacks.fc2_bias))
    fc1_weight, fc2_weight = stacks.fc1_weight.to(dtype), stacks.fc2_weight.to(dtype)
    return rows_RD.to(dtype), Stacks(fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def choose_kernel(
    stacks: Stacks, *, rows_per_expert: int | None = None, activation_dropout: float = 0.0
) -> Kernel:
    """The table.

    Args:
        stacks: parameters as they will be used, for their device, dtype and sizes.
        rows_per_expert: what every expert gets where the shape of the batch fixes it (padded dispatch);
            None: it depends on the routing.
        activation_dropout: the probability in force; 0 outside training.
    """
    weight = stacks.fc1_weight
    if weight.device.type == "cuda":
        if rows_per_expert is not None:
            return Kernel.BMM
        dims = (*weight.shape[1:], stacks.fc2_weight.shape[2])
        aligned = all(dim * weight.element_size() % _GROUPED_ALIGNMENT_BYTES == 0 for dim in dims)
        if (
            aligned
            and weight.dtype is torch.bfloat16
            and _cuda_capability(weight.device) >= _GROUPED_CAPABILITY
        ):
            return Kernel.GROUPED
        return Kernel.LOOP
    weights_per_expert = sum(math.prod(tensor.shape[1:]) for tensor in (weight, stacks.fc2_weight))
    is_small = rows_per_expert is not None and 2 * rows_per_expert * weights_per_expert <= _SMALL_EXPERT_FLOPS
    if is_small and arithmetic_dtype(weight) is weight.dtype:
        return Kernel.BMM
    return Kernel.LOOP if activation_dropout > 0 else Kernel.SLICED


@functools.cache
def _cuda_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def arithmetic_dtype(like: Tensor) -> torch.dtype:
    """What ``sliced`` and ``loop`` multiply in: float32 where a CPU has no units for narrower numbers.

    There torch's own half-precision product is 4 to 90 times slower than float32 (AVX2), and a slice of the
    weights is converted in a fiftieth of the time that it takes to multiply with it.
    """
    if like.device.type == "cpu" and like.dtype in (torch.bfloat16, torch.float16):
        return like.dtype if _cpu_multiplies(like.dtype) else torch.float32
    return like.dtype


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """The question that torch asks itself before it calls oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def run_experts(
    kernel: Kernel,
    source_SD: Tensor,
    stacks: Stacks,
    work: ExpertWork,
    *,
    activation: Activation,
    activation_dropout: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """w dropout(W2 activation_dropout(act(W1 x (+ b1))) (+ b2)) of each row's expert, added up where ``work`` says.

    Args:
        kernel: how.
        source_SD: float, rows sorted by expert, or what ``work.plan`` takes rows from.
        stacks: parameters, in the dtype of the rows.
        work: which rows are whose, where results go, and with what weight.
        activation: of each row, not in place, without parameters; elementwise or ``swiglu``.
        activation_dropout: probability, 0 outside training; ``sliced`` cannot do it.
        dropout: probability, 0 outside training.

    Returns:
        (S, D).

    Raises:
        TypeError: rows and parameters differ in dtype.
    """
    if source_SD.dtype != stacks.fc1_weight.dtype:
        raise TypeError(
            f"experts of dtype {stacks.fc1_weight.dtype} were given rows of dtype {source_SD.dtype}; "
            "convert one of them, or use torch.autocast"
        )
    wide = arithmetic_dtype(source_SD)
    with torch.autocast(source_SD.device.type, enabled=False):
        if kernel == Kernel.SLICED:
            return sliced_network(source_SD, stacks, work, activation=activation, dropout=dropout, wide=wide)
        linear = functools.partial(_linear, kernel, counts_L=tuple(work.counts_L), wide=wide)
        rows_RD = source_SD if work.plan is None else take_rows(source_SD, work.plan)
        hidden_RF = linear(rows_RD, stacks.fc1_weight, stacks.fc1_bias)
        weights_R = work.weights_R
        if weights_R is not None and stacks.fc2_bias is None:
            active_RF = weighted_activation(activation, hidden_RF, weights_R)
            weights_R = None
        else:
            active_RF = activation(hidden_RF)
        active_RF = F.dropout(active_RF, activation_dropout, training=activation_dropout > 0)
        y_RD = linear(active_RF, stacks.fc2_weight, stacks.fc2_bias)
        y_RD = F.dropout(y_RD, dropout, training=dropout > 0)
        return y_RD if work.plan is None else combine_rows(y_RD, weights_R, work.plan)


def _linear(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    counts_L: tuple[int, ...],
    wide: torch.dtype,
) -> Tensor:
    if kernel == Kernel.BMM:
        return batched_linear(x, weight, bias, counts_L)
    if kernel == Kernel.GROUPED:
        return grouped_linear(x, weight, bias, counts_L)
    return loop_linear(x, weight, bias, counts_L, wide=wide)
