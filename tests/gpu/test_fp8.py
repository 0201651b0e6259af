"""FP8 on the device: what torch multiplies equals what is emulated, without a wait for the device."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused.quantize_rows import quantize_columns, quantize_rows, quantize_rows_slowly
from fairseq_moe.modules.dispatch.rows import ExpertWork, plan_rows, take_weights
from fairseq_moe.modules.kernels import fp8
from fairseq_moe.modules.kernels.contract import Stacks
from fairseq_moe.modules.kernels.fp8 import Fp8Mode
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.kernels.table import Kernel, run_experts
from fairseq_moe.modules.routing.contract import RoutingDecision

T, K, L = 300, 2, 5
WIDTHS = (512, 272)  # model and expert; the second is a multiple of 16 and of nothing larger

CASES = {
    "swiglu, bfloat16": (swiglu, torch.bfloat16, False),
    "gelu with biases, bfloat16": (F.gelu, torch.bfloat16, True),
    "gelu with biases, float16": (F.gelu, torch.float16, True),
}


@pytest.fixture(autouse=True)
def _device_with_fp8(cuda: torch.device) -> None:
    problem = fp8.native_problem()
    if problem is not None:
        pytest.skip(problem)


def decision(device: torch.device) -> RoutingDecision:
    """Two of four experts each, the fifth has no rows; a fifth of the assignments are dropped."""
    generator = torch.Generator(device).manual_seed(0)
    ids_TK = torch.rand(T, L - 1, device=device, generator=generator).argsort(1)[:, :K]
    kept_TK = torch.rand(T, K, device=device, generator=generator) > 0.2
    return RoutingDecision.counted(
        expert_ids_TK=ids_TK, requested_TK=kept_TK, kept_TK=kept_TK, num_experts=L, capacity=None
    )


def leaves_of(case: str, device: torch.device) -> list[Tensor]:
    activation, dtype, has_biases = CASES[case]
    width, hidden = WIDTHS
    height = 2 * hidden if activation is swiglu else hidden
    shapes = [(T, width), (T, K), (L, height, width), (L, width, hidden)]
    shapes += [(L, height), (L, width)] if has_biases else []
    generator = torch.Generator(device).manual_seed(1)
    leaves = [torch.randn(shape, device=device, generator=generator) * 0.1 for shape in shapes]
    leaves[0] = leaves[0] * 10
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def run(case: str, leaves: list[Tensor], kernel: Kernel, mode: Fp8Mode | None) -> list[Tensor]:
    """Output and every gradient, with counts that the host does not know."""
    chosen = decision(leaves[0].device)
    plan = plan_rows(chosen)
    work = ExpertWork(counts_L=chosen.counts.kept_E, plan=plan, weights_R=take_weights(leaves[1], plan))
    fc1_bias, fc2_bias = leaves[4:] or (None, None)
    stacks = Stacks(leaves[2], fc1_bias, leaves[3], fc2_bias)
    y = run_experts(kernel, leaves[0], stacks, work, activation=CASES[case][0], fp8=mode)
    grad = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("case", CASES)
def test_native_equals_emulation(case: str, cuda: torch.device) -> None:
    leaves = leaves_of(case, cuda)
    native, emulated = (run(case, leaves, Kernel.FP8, mode) for mode in Fp8Mode)
    exact = run(case, leaves, Kernel.TRITON, None)
    for a, b, c in zip(native, emulated, exact, strict=True):
        assert a.dtype is b.dtype is leaves[0].dtype
        # Fast accumulation sums up in fewer bits than float32, and outputs are bfloat16.
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()
        assert (a.float() - c.float()).norm() <= 0.1 * c.float().norm()
    assert (native[0].float() - exact[0].float()).norm() > 0.01 * exact[0].float().norm()


def test_native_waits_for_nothing(cuda: torch.device) -> None:
    case = "gelu with biases, bfloat16"
    leaves = leaves_of(case, cuda)
    run(case, leaves, Kernel.FP8, Fp8Mode.NATIVE)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, leaves, Kernel.FP8, Fp8Mode.NATIVE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_rank_without_rows(cuda: torch.device) -> None:
    width, hidden = WIDTHS
    stack = [torch.randn(L, hidden, width), torch.randn(L, width, hidden)]
    fc1, fc2 = (weight.to(cuda, torch.bfloat16).requires_grad_() for weight in stack)
    x = torch.empty(0, width, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    y = run_experts(
        Kernel.FP8,
        x,
        Stacks(fc1, None, fc2, None),
        ExpertWork(counts_L=(0,) * L),
        activation=F.gelu,
        fp8=Fp8Mode.NATIVE,
    )
    y.sum().backward()
    assert y.shape == (0, width)
    assert not fc1.grad.any() and not fc2.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_and_columns_are_quantised_as_by_the_twin(dtype: torch.dtype, cuda: torch.device) -> None:
    """To the bit: the device's conversion rounds as torch's, also among the smallest values, and hides no NaN."""
    generator = torch.Generator(cuda).manual_seed(2)
    exponents = torch.randint(-14, 3, (1000, 1040), device=cuda, generator=generator)
    x = (torch.randn(1000, 1040, device=cuda, generator=generator) * 2.0**exponents).to(dtype)
    x[5] = 0
    expected, expected_scales = quantize_rows_slowly(x)
    columns, column_scales = quantize_columns(x.t().contiguous().unsqueeze(0))
    for values, scales in (quantize_rows(x), (columns[0], column_scales[0])):
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales, expected_scales)
    x[7, 3] = float("nan")
    values, scales = quantize_rows(x)
    assert (values.float() * scales.unsqueeze(1)).isfinite().all(1).sum() == 999
