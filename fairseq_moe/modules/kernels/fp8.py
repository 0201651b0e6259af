"""Multiply the experts' outputs and the gradients of their rows in FP8: e4m3, one scale for each row on either side.

Gradients of the matrices stay in the rows' own precision: they are sums over many tokens, where rounding adds up. Rows
and matrices are quantised inside the pass, after any gather of shards, so parameters, optimizer and checkpoints know
nothing of it, and a run may change its mind when it resumes.

``native`` multiplies by torch's scaled grouped product (capability 9.x and 10.x). ``emulate`` quantises alike and
multiplies what was quantised in float32 at least, anywhere: for tests, and to judge what FP8 does to a loss.
"""

from enum import StrEnum

import torch
from torch import Tensor

from fairseq_moe.fused.quantize_rows import quantize_columns, quantize_rows
from fairseq_moe.modules.kernels.contract import Stacks
from fairseq_moe.modules.kernels.products import Products

__all__ = ["Fp8Mode", "Fp8Products", "fp8_note", "native_problem", "runs_fp8", "width_problem"]

_CAPABILITIES = (9, 10)  # first numbers; torch's product refuses later ones, too
_DTYPES = (torch.bfloat16, torch.float16)
_WIDTHS = 16  # torch's product wants rows of a multiple of 16 bytes
# One H200, 2026-11-27, TFLOPS of the forward products, bfloat16 and FP8, quantising not counted: 8 experts of D 4096, F
# 14336 790 and 1056; 64 of 2048, 1408 718 and 849; 128 of 2048, 768 704 and 343. Quantising takes 0.1 to 0.7 ms, which
# is what the second would win. So the narrower of the two widths decides; between 1408 and 4096 none was measured, and
# none is assumed to pay. The rows were 2048 and twice 1024 per expert. How many there are does not decide, because it
# may depend on routing; but the cost of quantising a matrix does not shrink with them, and from the first figures it
# takes more than the product wins below about 1200 (computed, not measured).
_LEAST_WIDTH = 4096


class Fp8Mode(StrEnum):
    """Say how products in FP8 are computed."""

    NATIVE = "native"
    EMULATE = "emulate"


def native_problem() -> str | None:
    """Say in a phrase why this machine cannot multiply in FP8; None if it can."""
    if not torch.cuda.is_available():
        return "this process has no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability[0] not in _CAPABILITIES:
        return f"the device has compute capability {capability[0]}.{capability[1]}, expected 9.x or 10.x"
    if not hasattr(torch, "_scaled_grouped_mm"):
        return f"torch {torch.__version__} has no scaled grouped product"
    return None


def width_problem(model_dim: int, expert_dim: int) -> str | None:
    """Say in a phrase why experts of these widths cannot be multiplied in FP8; None if they can."""
    if model_dim % _WIDTHS == 0 and expert_dim % _WIDTHS == 0:
        return None
    return f"the widths {model_dim} (model) and {expert_dim} (expert) must be multiples of {_WIDTHS}"


def fp8_note(mode: Fp8Mode, model_dim: int, expert_dim: int) -> str:
    """Write one sentence for the log: what is multiplied in FP8, or why nothing is."""
    if mode is Fp8Mode.EMULATE:
        return (
            "--moe-fp8 emulate: experts are multiplied in emulated FP8, which is slow and for judging losses."
        )
    if min(model_dim, expert_dim) >= _LEAST_WIDTH:
        return "--moe-fp8 native: outputs of experts and gradients of their rows are multiplied in FP8."
    return (
        f"--moe-fp8 native: experts of widths {model_dim} and {expert_dim} are multiplied in their own precision, "
        f"because FP8 has been measured to pay from a width of {_LEAST_WIDTH} only (docs/benchmarks.md)."
    )


def runs_fp8(mode: Fp8Mode | None, stacks: Stacks) -> bool:
    """Tell whether experts are multiplied in FP8: always to emulate it, and natively where it pays.

    Commands that load a model trained in FP8 may run where there is none, or load it in float32; they then compute in
    its own precision.
    """
    if mode is not Fp8Mode.NATIVE:
        return mode is Fp8Mode.EMULATE
    weight = stacks.fc2_weight
    model_dim, expert_dim = weight.shape[1:]
    return (
        weight.is_cuda
        and weight.dtype in _DTYPES
        and min(model_dim, expert_dim) >= _LEAST_WIDTH
        and width_problem(model_dim, expert_dim) is None
        and native_problem() is None
    )


class Fp8Products:
    """Multiply in FP8 what pays, and the rest by other products.

    Args:
        mode: how.
        wide: multiply in full precision: gradients of matrices, and what was quantised where it is emulated.
        ends_L: int32, on the device, where each expert's rows end.
        is_sized: there are no rows behind the last expert's.
    """

    def __init__(self, mode: Fp8Mode, wide: Products, ends_L: Tensor, *, is_sized: bool) -> None:
        self.mode = mode
        self.wide = wide
        self.ends_L = ends_L
        self.num_rows = None if is_sized or len(ends_L) == 0 else ends_L[-1].long()

    def outputs(self, x_RI: Tensor, weight_LOI: Tensor) -> Tensor:
        """Multiply forward in FP8; see ``Products``."""
        rows = quantize_rows(x_RI, num_rows=self.num_rows)
        num_experts, height, width = weight_LOI.shape
        values, scales = quantize_rows(weight_LOI.reshape(-1, width))
        matrix = values.view(num_experts, height, width), scales.view(num_experts, height)
        return self._product(rows, matrix, like=x_RI)

    def grad_rows(self, grad_RO: Tensor, weight_LOI: Tensor) -> Tensor:
        """Pass the gradient back to the rows in FP8; see ``Products``."""
        rows = quantize_rows(grad_RO, num_rows=self.num_rows)
        return self._product(rows, quantize_columns(weight_LOI), like=grad_RO)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Sum the gradients of the matrices as they are; see ``Products``."""
        return self.wide.grad_weight(grad_RO, x_RI)

    def _product(self, rows: tuple[Tensor, Tensor], matrix: tuple[Tensor, Tensor], *, like: Tensor) -> Tensor:
        """Multiply rows (R, I) with the rows of each expert's matrix (L, O, I)."""
        (row_values, row_scales), (values, scales) = rows, matrix
        if len(row_values) == 0:
            return like.new_empty(0, values.shape[1])
        if self.mode is Fp8Mode.EMULATE:
            dtype = torch.promote_types(like.dtype, torch.float32)
            wide_rows = row_values.to(dtype) * row_scales.unsqueeze(1)
            return self.wide.outputs(wide_rows, values.to(dtype) * scales.unsqueeze(2)).to(like.dtype)
        product = torch._scaled_grouped_mm(
            row_values,
            values.transpose(1, 2),
            row_scales,
            scales,
            offs=self.ends_L,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return product.to(like.dtype)
