"""SwiGLU experts, without biases and with: kernels against plain maps, their start, and the gated shared network."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.kernels import table as kernels
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu, is_gated, swiglu, swiglu_backward
from fairseq_moe.modules.kernels.table import Choice, Kernel, Stacks, choose_kernel, run_experts
from fairseq_moe.modules.shared_experts import SharedExperts

L, D, H = 4, 8, 16
COUNTS = {"some": (3, 1, 5, 2), "zero": (4, 0, 7, 0), "equal": (3, 3, 3, 3), "none": (0,) * L}


class Result(NamedTuple):
    out: Tensor
    grads: tuple[Tensor, ...]


def leaves_of(counts: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((sum(counts), D), (L, 2 * H, D), (L, D, H))
    rows, fc1, fc2 = (
        torch.randn(shape, generator=generator).mul(0.5).to(dtype).requires_grad_() for shape in shapes
    )
    return rows, fc1, fc2


def with_gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> Result:
    cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return Result(out.detach(), torch.autograd.grad(out, leaves, cotangent))


def by_kernel(kernel: Kernel, counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Result:
    rows, fc1, fc2 = leaves_of(counts, dtype)
    out = run_experts(
        kernel, rows, Stacks(fc1, None, fc2, None), ExpertWork(counts_L=counts), activation=swiglu
    )
    return with_gradients(out, (rows, fc1, fc2))


def plain(counts: tuple[int, ...], dtype: torch.dtype = torch.float32, *, swapped: bool = False) -> Result:
    """Three linear maps per expert in float64, by autograd; ``swapped``: the up rows first, which is wrong."""
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves_of(counts, dtype))
    rows, fc1, fc2 = leaves
    parts = []
    for expert, x in enumerate(rows.split(counts)):
        first, second = F.linear(x, fc1[expert, :H]), F.linear(x, fc1[expert, H:])
        gate, up = (second, first) if swapped else (first, second)
        parts.append(F.linear(gate * torch.sigmoid(gate) * up, fc2[expert]))
    return with_gradients(torch.cat(parts), leaves)


def difference(a: Result, b: Result) -> float:
    pairs = zip((a.out, *a.grads), (b.out, *b.grads), strict=True)
    return max((float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=0.0)


class TestKernels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
    @pytest.mark.parametrize("kernel", [kernel for kernel in Kernel if kernel is not Kernel.FP8])
    def test_output_and_every_gradient(
        self, kernel: Kernel, counts: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        found = by_kernel(kernel, counts, dtype)
        assert all(tensor.dtype is dtype for tensor in (found.out, *found.grads))
        tolerance = 1e-5 if dtype is torch.float32 else 0.05
        assert difference(found, plain(counts, dtype)) < tolerance

    def test_order_of_gate_and_up_matters(self) -> None:
        assert difference(by_kernel(Kernel.SLICED, (3, 1, 5, 2)), plain((3, 1, 5, 2), swapped=True)) > 0.1

    @pytest.mark.parametrize("kernel", [Kernel.SLICED, Kernel.LOOP, Kernel.BMM])
    def test_gradcheck(self, kernel: Kernel) -> None:
        leaves = leaves_of((2, 0, 1, 2), torch.float64)

        def network(rows: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
            return run_experts(
                kernel,
                rows,
                Stacks(fc1, None, fc2, None),
                ExpertWork(counts_L=(2, 0, 1, 2)),
                activation=swiglu,
            )

        assert torch.autograd.gradcheck(network, leaves, fast_mode=True)

    @pytest.mark.parametrize("frozen", [0, 1, 2])
    @pytest.mark.parametrize("kernel", [kernel for kernel in Kernel if kernel is not Kernel.FP8])
    def test_frozen_inputs(self, kernel: Kernel, frozen: int) -> None:
        counts = COUNTS["zero"]
        leaves = leaves_of(counts, torch.float32)
        leaves[frozen].requires_grad_(False)
        rows, fc1, fc2 = leaves
        out = run_experts(
            kernel, rows, Stacks(fc1, None, fc2, None), ExpertWork(counts_L=counts), activation=swiglu
        )
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        for index, (leaf, expected) in enumerate(zip(leaves, by_kernel(kernel, counts).grads, strict=True)):
            assert (leaf.grad is None) == (index == frozen)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected)

    def test_backward_formula(self) -> None:
        hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(5, 3, dtype=torch.float64)
        values = swiglu(hidden)
        (expected,) = torch.autograd.grad(values, hidden, grad)
        found, found_grad = swiglu_backward(grad, hidden.detach())
        torch.testing.assert_close(found, values.detach())
        torch.testing.assert_close(found_grad, expected)

    def test_backward_of_clamped_halves(self) -> None:
        # At a bound the gradient is that of the values within, beyond it 0, and NaN has none, as torch.clamp says.
        limit, nan, inf = 0.75, float("nan"), float("inf")
        activation = ClampedSwiglu(alpha=1.702, limit=limit)
        sides = torch.tensor([limit, limit + 1e-9, -limit, -limit - 1e-9, nan, inf, 0.5], dtype=torch.float64)
        hidden = torch.cartesian_prod(sides, sides).requires_grad_()
        grad = torch.linspace(-1, 1, len(hidden), dtype=torch.float64).unsqueeze(1)
        values = activation(hidden)
        (expected,) = torch.autograd.grad(values, hidden, grad)
        found, found_grad = activation.backward(grad, hidden.detach())
        torch.testing.assert_close(found, values.detach(), equal_nan=True)
        torch.testing.assert_close(found_grad, expected, equal_nan=True)
        assert found[hidden.isnan().any(1)].isnan().all() and found[hidden.isfinite().all(1)].isfinite().all()

    def test_clamped_halves_by_numbers(self) -> None:
        # (u + 1) g / (1 + exp(-2 g)) of (3, -5), (-1, 0.5) and (0.5, 9) within 2.
        hidden = torch.tensor([[3.0, -1.0, 0.5, -5.0, 0.5, 9.0]])
        sigmoid = [0.9820137900379085, 0.11920292202211755, 0.7310585786300049]  # of 4, -2 and 1
        expected = torch.tensor([[-1 * 2 * sigmoid[0], 1.5 * -1 * sigmoid[1], 3 * 0.5 * sigmoid[2]]])
        torch.testing.assert_close(ClampedSwiglu(alpha=2.0, limit=2.0)(hidden), expected)

    def test_what_is_gated(self) -> None:
        assert is_gated(swiglu) and is_gated(ClampedSwiglu(alpha=1.0, limit=7.0)) and not is_gated(F.silu)

    def test_small_counts_all_three_matrices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, fc1, fc2 = leaves_of((1,) * L, torch.float32)
        flops = 2 * 16 * 3 * H * D
        for limit, expected in ((flops, Kernel.BMM), (flops - 1, Kernel.SLICED)):
            small = Choice(Kernel.BMM, fixed_rows=True, max_expert_flops=limit)
            monkeypatch.setattr(kernels, "CHOICES", (small, Choice(Kernel.SLICED)))
            assert choose_kernel(Stacks(fc1, None, fc2, None), rows_per_expert=16) is expected


def make(
    num_local: int = 3, first: int = 0, *, std: float | None = 0.02, gated_bias: bool = False
) -> Experts:
    return Experts(
        num_local_experts=num_local,
        first_expert_id=first,
        model_dim=64,
        hidden_dim=96,
        activation=swiglu,
        seed=5,
        marks={name: {"expert": True} for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")},
        init_std=std,
        gated_bias=gated_bias,
    )


class TestModule:
    def test_stacks(self) -> None:
        experts = make()
        shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
        assert shapes == {"fc1_weight": (3, 192, 64), "fc2_weight": (3, 64, 96)}
        assert all(p.expert for p in copy.deepcopy(experts).half().parameters())
        assert set(experts.state_dict()) == set(shapes)

    def test_biases_on_request(self) -> None:
        experts = make(gated_bias=True)
        shapes = {name: tuple(p.shape) for name, p in experts.named_parameters() if "bias" in name}
        assert shapes == {"fc1_bias": (3, 192), "fc2_bias": (3, 64)}
        assert all(p.expert for p in copy.deepcopy(experts).half().parameters())

    @pytest.mark.parametrize("gated_bias", [False, True])
    @pytest.mark.parametrize("std", [0.02, None])
    def test_start_does_not_depend_on_the_ranks(self, std: float | None, gated_bias: bool) -> None:
        whole, *parts = (make(*share, std=std, gated_bias=gated_bias) for share in ((4, 0), (2, 0), (2, 2)))
        for name, stack in whole.named_parameters():
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), stack)
        expected = 0.02 if std is not None else (1 / 3 / 64) ** 0.5
        assert abs(float(whole.fc1_weight.detach().std()) / expected - 1) < 0.03

    def test_autocast(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert make()(torch.randn(3, 64), ExpertWork(counts_L=[1, 0, 2])).dtype is torch.bfloat16

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("gated", [False, True])
    def test_shared_network(self, gated: bool, biased: bool) -> None:
        shared = SharedExperts(model_dim=D, hidden_dim=H, activation=swiglu, gated_bias=biased, gated=gated)
        assert {name: tuple(p.shape) for name, p in shared.named_parameters()} == {
            "fc1.weight": (2 * H, D),
            "fc2.weight": (D, H),
            **({"fc1.bias": (2 * H,), "fc2.bias": (D,)} if biased else {}),
            **({"gate.weight": (1, D)} if gated else {}),
        }
        x = torch.randn(5, D)
        gate, up = F.linear(x, shared.fc1.weight, shared.fc1.bias).chunk(2, dim=-1)
        expected = F.linear(F.silu(gate) * up, shared.fc2.weight, shared.fc2.bias)
        if gated:
            expected = torch.sigmoid(x @ shared.gate.weight.t()) * expected
        torch.testing.assert_close(shared(x), expected)
