"""The parts of bench_gpu.py: each measures some things and returns a row for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench_gpu_kernels import kernel_cases, optimizer_steps
from bench_gpu_layer import layer, routing
from bench_gpu_timer import Bench, Step
from bench_gpu_training import training_rows
from torch import Tensor

from fairseq_moe.fused.launch import runs_triton
from fairseq_moe.fused.quantize_rows import quantize_rows
from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.kernels.fp8 import Fp8Mode
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.kernels.table import Kernel, Stacks, run_experts

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """One part: its title, its share of the time, and what measures it."""

    title: str
    share: float
    measure: Callable[[Bench], list[dict[str, Any]]]


def ceilings(bench: Bench) -> list[dict[str, Any]]:
    """A large product and a copy: what this device can do at most."""
    size = 64 if bench.is_small else 8192
    a, b = bench.random(size, size), bench.random(size, size)
    product_ms = bench.ms(lambda: a @ b)
    source = torch.empty(1 << (16 if bench.is_small else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy_ms = bench.ms(lambda: target.copy_(source))
    return [
        {"what": f"bf16 product {size}^3", "TFLOPS": 2 * size**3 / product_ms / 1e9},
        {"what": "copy", "TB/s": 2 * source.numel() / copy_ms / 1e9},
    ]


def kernels(bench: Bench) -> list[dict[str, Any]]:
    """Each fused kernel beside its twin in plain torch, with the bytes that it must move."""
    found = []
    for case in kernel_cases(bench.device, is_small=bench.is_small):
        if not bench.has_time(case.name):
            continue
        fused_ms, slow_ms = bench.ms(case.fused), bench.ms(case.slow, repeats=5)
        found.append(
            {
                "kernel": case.name,
                "ms": fused_ms,
                "twin, ms": slow_ms,
                "TB/s": case.num_bytes / fused_ms / 1e9,
                "runs Triton": runs_triton(torch.empty(1, device=bench.device)),
            }
        )
    return found


EXPERT_SIZES = (
    (8, 2048, 4096, 14336),
    (8, 1024, 1024, 4096),
    (64, 256, 2048, 1408),
    (128, 1024, 2048, 768),
    (128, 128, 1024, 512),
)


def expert_passes(
    x: Tensor,
    stacks: Stacks,
    counts: list[int],
    kernel: Kernel,
    activation: Callable[[Tensor], Tensor],
    mode: Fp8Mode | None = None,
) -> Step:
    """Forward and backward of experts by one kernel."""
    leaves, grad = [x, *(stack for stack in stacks if stack is not None)], x.detach()

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        work = ExpertWork(counts_L=counts)
        run_experts(kernel, x, stacks, work, activation=activation, fp8=mode).backward(grad)

    return step


def _tried(bench: Bench, step: Step) -> float | str:
    """Milliseconds, or why there are none."""
    try:
        return bench.ms(step, repeats=5)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"


def experts(bench: Bench) -> list[dict[str, Any]]:
    """The ways to multiply experts, equal rows, GELU with biases, forward and backward, in milliseconds."""
    found = []
    ways = (Kernel.LOOP, Kernel.BMM, Kernel.GROUPED, Kernel.TRITON)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num, rows, width, hidden in ((4, 8, 16, 16),) if bench.is_small else EXPERT_SIZES:
            name = f"{str(dtype).removeprefix('torch.')}: {num}, {rows}, {width}, {hidden}"
            takes_seconds = dtype is torch.float32 and hidden * width > 1 << 24
            if takes_seconds or not bench.has_time(name):
                continue
            row: dict[str, Any] = {"dtype: E, rows each, D, F": name}
            shapes = ((num, hidden, width), (num, hidden), (num, width, hidden), (num, width))
            stacks = Stacks(*(bench.random(*shape, dtype=dtype).requires_grad_() for shape in shapes))
            x = bench.random(num * rows, width, dtype=dtype).requires_grad_()
            for kernel in ways:
                row[kernel] = _tried(bench, expert_passes(x, stacks, [rows] * num, kernel, F.gelu))
            found.append(row)
    return found


def fp8(bench: Bench) -> list[dict[str, Any]]:
    """Experts in FP8 beside bfloat16, forward and backward, quantising included."""
    found = []
    for num, rows, width, hidden in ((4, 16, 32, 32),) if bench.is_small else EXPERT_SIZES:
        name = f"{num}, {rows}, {width}, {hidden}"
        if not bench.has_time(name):
            continue
        fc1 = bench.random(num, 2 * hidden, width).requires_grad_()
        fc2 = bench.random(num, width, hidden).requires_grad_()
        x, stacks = bench.random(num * rows, width).requires_grad_(), Stacks(fc1, None, fc2, None)
        # Emulation computes in float32: on a GPU it is for tests, and takes seconds at these sizes.
        label, mode = ("emulate", Fp8Mode.EMULATE) if bench.is_small else ("native", Fp8Mode.NATIVE)
        row: dict[str, Any] = {"E, rows each, D, F": name}
        row["bf16 experts, ms"] = _tried(
            bench, expert_passes(x, stacks, [rows] * num, Kernel.GROUPED, swiglu)
        )
        fp8_step = expert_passes(x, stacks, [rows] * num, Kernel.FP8, swiglu, mode)
        row[f"FP8 experts ({label}), ms"] = _tried(bench, fp8_step)
        flops = 4 * num * rows * width * hidden
        for column, step in fp8_products(x.detach(), fc1.detach(), rows).items():
            ms = "" if bench.is_small else _tried(bench, step)
            row[column] = flops / ms / 1e9 if isinstance(ms, float) else ms
        found.append(row)
    return found


def fp8_products(x: Tensor, weight: Tensor, rows: int) -> dict[str, Step]:
    """The first product of experts alone, forward: in bfloat16, in FP8, and in FP8 with its rows quantised first."""
    num, height, width = weight.shape
    ends = torch.arange(1, num + 1, device=x.device, dtype=torch.int32) * rows
    codes, scales = quantize_rows(weight.view(-1, width))
    matrix, matrix_scales = codes.view(num, height, width).transpose(1, 2), scales.view(num, height)
    x_codes, x_scales = quantize_rows(x)

    def product(given: tuple[Tensor, Tensor]) -> Tensor:
        return torch._scaled_grouped_mm(
            given[0],
            matrix,
            given[1],
            matrix_scales,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return {
        "bf16 product, TFLOPS": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends),
        "FP8 product, TFLOPS": lambda: product((x_codes, x_scales)),
        "quantised and multiplied, TFLOPS": lambda: product(quantize_rows(x)),
    }


def optimizers(bench: Bench) -> list[dict[str, Any]]:
    """A step of each optimizer on 0.91 B parameters, in milliseconds."""
    shapes = [(64, 64)] * 3 if bench.is_small else [(8, 4096, 14336), (8, 4096, 12800), (2048, 10240)]
    found = []
    for name, step, num_parameters in optimizer_steps(bench.device, shapes):
        if bench.has_time(name):
            found.append({"optimizer": name, "parameters": num_parameters, "ms": bench.ms(step, repeats=5)})
    return found


PARTS = {
    "ceilings": Part("what this device does at most", 1, ceilings),
    "layer": Part("useful TFLOPS, forward + backward, bfloat16, SwiGLU", 6, layer),
    "routing": Part("router, plan and statistics, forward", 1, routing),
    "kernels": Part("fused kernels", 3, kernels),
    "experts": Part("ways to multiply experts, GELU with biases, forward + backward, ms", 3, experts),
    "fp8": Part("FP8 beside bfloat16", 2, fp8),
    "optimizers": Part("one step", 2, optimizers),
    "training": Part("fairseq-train", 14, training_rows),
}
