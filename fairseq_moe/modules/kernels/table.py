"""Which code computes the experts: two tables, one of the kernels and one of the choices between them.

========= =======================================================================================
kernel    how
========= =======================================================================================
sliced    expert after expert, fc1, activation and fc2 in one go, so that a slice stays in the cache
loop      expert after expert, but all of fc1 before all of fc2: leaves room for activation dropout
bmm       one batched product per matrix; rows padded to the busiest expert unless all have as many
grouped   one ``torch.nn.functional.grouped_mm`` per matrix
triton    one launch of our own grouped product per matrix
fp8       as grouped, with outputs and the rows' gradients in FP8, where ``--moe-fp8`` asks for it and it pays
========= =======================================================================================

The choice follows from the device, the dtype and sizes, never from anyone's data. All kernels compute the same
function and the same gradients, so a checkpoint knows nothing of them. An expert without rows gets zero
gradients, not missing ones: optimizers and reductions see the same tensors on every rank.

A further kernel is a ``KernelFunction`` (``contract``), a name in ``Kernel``, a line in ``KERNELS``, and a row of
``CHOICES`` with the measurement that speaks for it.
"""

import functools
import math
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_moe.fused.launch import has_triton
from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.kernels.activation import Activation
from fairseq_moe.modules.kernels.by_matrix import (
    batched_network,
    fp8_network,
    grouped_network,
    loop_network,
    triton_network,
)
from fairseq_moe.modules.kernels.contract import KernelFunction, Network, Stacks, under_autocast
from fairseq_moe.modules.kernels.fp8 import Fp8Mode, runs_fp8
from fairseq_moe.modules.kernels.sliced import sliced_network

__all__ = [
    "CHOICES",
    "KERNELS",
    "Choice",
    "Kernel",
    "Stacks",
    "arithmetic_dtype",
    "choose_kernel",
    "run_experts",
    "under_autocast",
]


class Kernel(StrEnum):
    """Names the kernels; the table of this module says how each computes."""

    SLICED = "sliced"
    LOOP = "loop"
    BMM = "bmm"
    GROUPED = "grouped"
    TRITON = "triton"
    FP8 = "fp8"


KERNELS: dict[Kernel, KernelFunction] = {
    Kernel.SLICED: sliced_network,
    Kernel.LOOP: loop_network,
    Kernel.BMM: batched_network,
    Kernel.GROUPED: grouped_network,
    Kernel.TRITON: triton_network,
    Kernel.FP8: fp8_network,
}


class Choice(NamedTuple):
    """A row of ``CHOICES``: its kernel is taken where every condition holds; a default is no condition.

    Args:
        kernel: what is taken.
        device: type of the parameters' device.
        dtypes: dtypes of the parameters.
        native: the device has units for that dtype: ``arithmetic_dtype`` is the dtype itself.
        min_capability: least compute capability; with ``device="cuda"`` only.
        row_bytes: divides the bytes of every row of every matrix.
        needs_triton: Triton is installed.
        max_experts: largest number of local experts.
        min_matrix_numel: least number of elements of an expert's second matrix.
        fixed_rows: the shape of the batch fixes how many rows every expert gets.
        max_expert_flops: most operations of one expert's forward products; with ``fixed_rows`` only.
        activation_dropout: values after the activation are dropped.
    """

    kernel: Kernel
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    native: bool = False
    min_capability: tuple[int, int] = (0, 0)
    row_bytes: int = 1
    needs_triton: bool = False
    max_experts: float = math.inf
    min_matrix_numel: int = 0
    fixed_rows: bool = False
    max_expert_flops: float = math.inf
    activation_dropout: bool = False

    def fits(self, stacks: Stacks, *, rows_per_expert: int | None, activation_dropout: float) -> bool:
        """Check the conditions; the arguments are those of ``choose_kernel``."""
        weight = stacks.fc1_weight
        return (
            self.device in (None, weight.device.type)
            and (self.dtypes is None or weight.dtype in self.dtypes)
            and (not self.native or arithmetic_dtype(weight) is weight.dtype)
            and (self.min_capability == (0, 0) or _cuda_capability(weight.device) >= self.min_capability)
            and all(dim * weight.element_size() % self.row_bytes == 0 for dim in _row_lengths(stacks))
            and (not self.needs_triton or has_triton())
            and weight.shape[0] <= self.max_experts
            and math.prod(stacks.fc2_weight.shape[1:]) >= self.min_matrix_numel
            and (not self.fixed_rows or rows_per_expert is not None)
            and (rows_per_expert or 0) * _flops_per_row(stacks) <= self.max_expert_flops
            and (not self.activation_dropout or activation_dropout > 0)
        )


# The first row that fits is taken. Times are of a forward and backward pass, all experts with as many rows.
CHOICES = (
    # One H200, 2026-11-27. 64 experts of 256 rows, D 2048, F 1408: loop 18.5 ms, grouped 2.3, bmm 1.6 (bf16); 15.4,
    # 9.0, 1.3 (fp16); 22.9, 18.6, 12.4 (fp32). 8 of 2048, D 4096, F 14336: 18.3, 19.0, 18.7 (bf16). No padding here.
    Choice(Kernel.BMM, "cuda", fixed_rows=True),
    # As above. torch refuses other rows than of a multiple of 16 bytes, and below capability 9.0 its grouped_mm is
    # itself a loop, with a host synchronisation per call (read in its source, not measured).
    Choice(Kernel.GROUPED, "cuda", (torch.bfloat16,), min_capability=(9, 0), row_bytes=16),
    # As above, few large experts: 8 of D 4096, F 14336 loop 18.4 ms, bmm 19.3 (fp16); 8 of D 2048, F 8192 whole layers
    # 395 TFLOPS against 379 of grouped (bf16). It waits for the counts, for less than a hundredth of such a pass.
    Choice(Kernel.LOOP, "cuda", max_experts=16, min_matrix_numel=1 << 24),
    # The rest of the GPUs' cases in at most float32. As above: with many experts a loop takes about 0.27 ms per expert
    # and pass on the host, twelve times as long as bmm on equal rows. Our product itself has not been measured.
    # Below capability 8.0 Triton multiplies half precision without tensor cores (seen in the code that it makes).
    Choice(Kernel.TRITON, "cuda", (torch.float16, torch.bfloat16), needs_triton=True, min_capability=(8, 0)),
    Choice(Kernel.TRITON, "cuda", (torch.float32,), needs_triton=True),
    Choice(Kernel.LOOP, "cuda"),
    # docs/benchmarks.md, Kernels (2 cores with AVX2, fp32): one batched product spares the calls of a loop (8 experts
    # of 1 Mflop: bmm 1.3 ms, sliced 3.2), and pays with slices that have left the cache (64 of 34: 224 and 170).
    Choice(Kernel.BMM, native=True, fixed_rows=True, max_expert_flops=4_000_000),
    # Not for speed (there, 8 experts of 512 rows, D 512, F 2048: loop 867 ms, sliced 819): sliced cannot drop them.
    Choice(Kernel.LOOP, activation_dropout=True),
    Choice(Kernel.SLICED),
)


def choose_kernel(
    stacks: Stacks,
    *,
    rows_per_expert: int | None = None,
    activation_dropout: float = 0.0,
    fp8: Fp8Mode | None = None,
) -> Kernel:
    """Choose FP8 where it was asked for and pays, and else by the first row of ``CHOICES`` that fits.

    Args:
        stacks: parameters as they will be used, for their device, dtype and sizes.
        rows_per_expert: what every expert gets where the shape of the batch fixes it (padded dispatch);
            None: it depends on the routing.
        activation_dropout: the probability in force; 0 outside training.
        fp8: how products are to be computed in FP8; None: not.
    """
    if runs_fp8(fp8, stacks):
        return Kernel.FP8
    return next(
        choice.kernel
        for choice in CHOICES
        if choice.fits(stacks, rows_per_expert=rows_per_expert, activation_dropout=activation_dropout)
    )


def _row_lengths(stacks: Stacks) -> tuple[int, ...]:
    return (*stacks.fc1_weight.shape[1:], stacks.fc2_weight.shape[2])


def _flops_per_row(stacks: Stacks) -> int:
    return 2 * sum(math.prod(weight.shape[1:]) for weight in (stacks.fc1_weight, stacks.fc2_weight))


@functools.cache
def _cuda_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def arithmetic_dtype(like: Tensor) -> torch.dtype:
    """Choose the dtype in which ``sliced`` and ``loop`` multiply: float32 where a CPU has no units for a narrower one.

    There torch's own half-precision product is 4 to 90 times slower than float32 (docs/benchmarks.md, AVX2), and a
    slice of the weights is converted in a fiftieth of the time that it takes to multiply with it.
    """
    if like.device.type == "cpu" and like.dtype in (torch.bfloat16, torch.float16):
        return like.dtype if _cpu_multiplies(like.dtype) else torch.float32
    return like.dtype


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # The question that torch asks itself before it calls oneDNN.
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
    fp8: Fp8Mode | None = None,
) -> Tensor:
    """Compute w dropout(W2 activation_dropout(act(W1 x (+ b1))) (+ b2)) of each row's expert; add up as ``work`` says.

    Args:
        kernel: how.
        source_SD: float, rows sorted by expert, or what ``work.plan`` takes rows from.
        stacks: parameters, in the dtype of the rows.
        work: how many rows each expert has, where results go, and with what weight.
        activation: of each row, not in place, without parameters; elementwise or gated.
        activation_dropout: probability, 0 outside training.
        dropout: probability, 0 outside training.
        fp8: how the kernel ``fp8`` multiplies.

    Returns:
        (S, D).

    Raises:
        TypeError: rows and parameters differ in dtype.
        ValueError: the kernel is ``sliced``, which cannot drop values after the activation, and has to.
    """
    if source_SD.dtype != stacks.fc1_weight.dtype:
        raise TypeError(
            f"experts of dtype {stacks.fc1_weight.dtype} were given rows of dtype {source_SD.dtype}; "
            "convert one of them, or use torch.autocast"
        )
    network = Network(activation, activation_dropout, dropout, wide=arithmetic_dtype(source_SD), fp8=fp8)
    with torch.autocast(source_SD.device.type, enabled=False):
        return KERNELS[kernel](source_SD, stacks, work, network)
