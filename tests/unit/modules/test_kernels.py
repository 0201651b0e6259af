"""Kernels of the experts: equal in output and every gradient; chosen by sizes; gradients in kept memory."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.kernels import table as kernels
from fairseq_moe.modules.kernels.contract import Network
from fairseq_moe.modules.kernels.sliced import sliced_network
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu, is_gated, swiglu
from fairseq_moe.modules.kernels.table import (
    CHOICES,
    KERNELS,
    Choice,
    Kernel,
    Stacks,
    arithmetic_dtype,
    choose_kernel,
    run_experts,
)

L, D, H = 4, 8, 16
COUNTS = {
    "some": (3, 1, 5, 2),
    "zero": (4, 0, 7, 0),
    "one": (0, 0, 11, 0),
    "equal": (3, 3, 3, 3),
    "none": (0,) * L,
}
ALL = [kernel for kernel in Kernel if kernel is not Kernel.FP8]  # which rounds: test_fp8.py


class Result(NamedTuple):
    out: Tensor
    grads: list[Tensor]


def stacks_of(dtype: torch.dtype = torch.float32, activation: Callable[[Tensor], Tensor] = F.gelu) -> Stacks:
    generator = torch.Generator().manual_seed(3)
    outputs = 2 * H if is_gated(activation) else H
    shapes = ((L, outputs, D), (L, outputs), (L, D, H), (L, D))
    return Stacks(*(torch.randn(s, generator=generator).mul(0.3).to(dtype).requires_grad_() for s in shapes))


def rows_of(counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(sum(counts), D, generator=generator).to(dtype).requires_grad_()


def run(
    kernel: Kernel,
    counts: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    activation: Callable[[Tensor], Tensor] = F.gelu,
) -> Result:
    rows, stacks = rows_of(counts, dtype), stacks_of(dtype, activation)
    out = run_experts(kernel, rows, stacks, ExpertWork(counts_L=counts), activation=activation)
    cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
    return Result(out.detach(), list(torch.autograd.grad(out, (rows, *stacks), cotangent)))


def plain(counts: tuple[int, ...], dtype: torch.dtype, activation: Callable[[Tensor], Tensor]) -> Result:
    """One pair of linear maps per expert, in float64, by autograd."""
    rows = rows_of(counts, dtype).double()
    stacks = [stack.double() for stack in stacks_of(dtype, activation)]
    leaves = [tensor.detach().requires_grad_() for tensor in (rows, *stacks)]
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = leaves
    parts = [
        F.linear(activation(F.linear(part, fc1_weight[e], fc1_bias[e])), fc2_weight[e], fc2_bias[e])
        for e, part in enumerate(x.split(counts))
    ]
    out = torch.cat(parts)
    cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype).double()
    return Result(out.detach(), list(torch.autograd.grad(out, leaves, cotangent)))


class TestEquality:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
    @pytest.mark.parametrize("kernel", ALL)
    def test_output_and_every_gradient(
        self, kernel: Kernel, counts: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        found, expected = run(kernel, counts, dtype), plain(counts, dtype, F.gelu)
        # The hidden layer is rounded once; a sum over rows of such values is off by more than one rounding.
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        for a, b in zip((found.out, *found.grads), (expected.out, *expected.grads), strict=True):
            assert a.dtype is dtype
            torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)

    @pytest.mark.parametrize(
        "activation",
        [F.relu, torch.tanh, F.silu, lambda x: x, swiglu, ClampedSwiglu(alpha=1.702, limit=0.5)],
        ids=["relu", "tanh", "silu", "identity", "swiglu", "clamped swiglu"],
    )
    @pytest.mark.parametrize("kernel", ALL)
    def test_activations(self, kernel: Kernel, activation: Callable[[Tensor], Tensor]) -> None:
        counts = COUNTS["zero"]
        found = run(kernel, counts, activation=activation)
        expected = plain(counts, torch.float32, activation)
        for a, b in zip((found.out, *found.grads), (expected.out, *expected.grads), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kernel", ALL)
    def test_experts_without_rows_get_zeros(self, kernel: Kernel) -> None:
        for grad in run(kernel, COUNTS["zero"]).grads[1:]:
            assert not grad[1].any() and not grad[3].any() and grad[0].any()

    def test_values_after_gelu_may_be_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # As on a CPU with units for bfloat16.
        monkeypatch.setattr(kernels, "arithmetic_dtype", lambda like: like.dtype)
        found, expected = (
            run(Kernel.SLICED, COUNTS["some"], torch.bfloat16),
            run(Kernel.LOOP, COUNTS["some"], torch.bfloat16),
        )
        for a, b in zip((found.out, *found.grads), (expected.out, *expected.grads), strict=True):
            torch.testing.assert_close(a, b, atol=0.03, rtol=0.03)


class TestGradients:
    @pytest.mark.parametrize("kernel", [Kernel.LOOP, Kernel.SLICED, Kernel.BMM])
    @pytest.mark.parametrize("counts", [(2, 0, 1, 2), (2, 2, 2, 2)], ids=str)
    def test_gradcheck(self, kernel: Kernel, counts: tuple[int, ...]) -> None:
        leaves = (rows_of(counts, torch.float64), *stacks_of(torch.float64))

        def network(rows: Tensor, *stacks: Tensor) -> Tensor:
            return run_experts(kernel, rows, Stacks(*stacks), ExpertWork(counts_L=counts), activation=F.gelu)

        assert torch.autograd.gradcheck(network, leaves, fast_mode=True)

    @pytest.mark.parametrize("frozen", [(0,), (1, 3), (2, 4), (0, 1, 2)], ids=str)
    @pytest.mark.parametrize("kernel", ALL)
    def test_frozen_inputs_cost_nothing_and_change_nothing(
        self, kernel: Kernel, frozen: tuple[int, ...]
    ) -> None:
        counts = COUNTS["zero"]
        everything = run(kernel, counts)
        rows, stacks = rows_of(counts), stacks_of()
        leaves = (rows, *stacks)
        for index in frozen:
            leaves[index].requires_grad_(False)
        out = run_experts(kernel, rows, stacks, ExpertWork(counts_L=counts), activation=F.gelu)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        for index, leaf in enumerate(leaves):
            if index in frozen:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None
                torch.testing.assert_close(leaf.grad, everything.grads[index])

    @pytest.mark.parametrize("kernel", ALL)
    def test_cotangents_and_rows_with_strange_strides(self, kernel: Kernel) -> None:
        counts = COUNTS["some"]
        rows, stacks = rows_of(counts), stacks_of()
        strange = rows.detach().t().contiguous().t().requires_grad_()
        for cotangent in (torch.ones(1, 1).expand(len(rows), D), torch.randn(D, len(rows)).t()):
            grads = [
                torch.autograd.grad(
                    run_experts(kernel, x, stacks, ExpertWork(counts_L=counts), activation=F.gelu),
                    (x, *stacks),
                    c,
                )
                for x, c in ((rows, cotangent.contiguous()), (strange, cotangent))
            ]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("kernel", ALL)
    def test_gradients_of_stacks_are_contiguous(self, kernel: Kernel) -> None:
        # Else autograd would copy them into p.grad.
        assert all(grad.is_contiguous() for grad in run(kernel, COUNTS["equal"]).grads)


class Described(NamedTuple):
    """What the table looks at."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]

    def element_size(self) -> int:
        return self.dtype.itemsize


def described(device: str, dtype: torch.dtype, fc1_shape: tuple[int, int, int]) -> Stacks:
    num_experts, hidden_dim, model_dim = fc1_shape
    on = torch.device(device, 0)
    fc1, fc2 = Described(on, dtype, fc1_shape), Described(on, dtype, (num_experts, model_dim, hidden_dim))
    return Stacks(fc1, None, fc2, None)  # type: ignore[arg-type]


class Case(NamedTuple):
    device: str
    dtype: torch.dtype
    capability: tuple[int, int]
    has_units: bool
    num_experts: int
    model_dim: int
    rows_per_expert: int | None
    activation_dropout: float


HIDDEN_DIM = 128
GRID = [
    Case(*values)
    for values in itertools.product(
        ("cpu", "cuda"),
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0)),
        (False, True),
        (1, 8, 128),
        (60, 64, 68, 1 << 17),  # the last one makes matrices of 2**24 elements
        (None, 1, 122, 123, 10**6),  # 122 rows are 3,997,696 operations where model_dim is 64
        (0.0, 0.1),
    )
]


def rule_of_today(case: Case) -> Kernel:
    """The choice as sentences, written down before it became a table."""
    if case.device == "cuda":
        if case.rows_per_expert is not None:
            return Kernel.BMM
        whole_16_bytes = case.model_dim * case.dtype.itemsize % 16 == 0  # HIDDEN_DIM always has
        if case.dtype is torch.bfloat16 and whole_16_bytes and case.capability in ((9, 0), (10, 0)):
            return Kernel.GROUPED
        is_few_and_large = case.num_experts <= 16 and case.model_dim * HIDDEN_DIM >= 2**24
        is_old = case.capability < (8, 0) and case.dtype is not torch.float32
        return Kernel.LOOP if is_few_and_large or is_old or case.dtype is torch.float64 else Kernel.TRITON
    is_half = case.dtype in (torch.float16, torch.bfloat16)
    if case.rows_per_expert is not None and (case.has_units or not is_half):
        flops = 2 * case.rows_per_expert * (2 * HIDDEN_DIM * case.model_dim)
        if flops <= 4_000_000:
            return Kernel.BMM
    return Kernel.LOOP if case.activation_dropout else Kernel.SLICED


class TestTables:
    def test_choices_are_those_of_today(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen = set()
        for case in GRID:
            monkeypatch.setattr(kernels, "_cuda_capability", lambda device, case=case: case.capability)
            monkeypatch.setattr(kernels, "_cpu_multiplies", lambda dtype, case=case: case.has_units)
            kernel = choose_kernel(
                described(case.device, case.dtype, (case.num_experts, HIDDEN_DIM, case.model_dim)),
                rows_per_expert=case.rows_per_expert,
                activation_dropout=case.activation_dropout,
            )
            assert kernel is rule_of_today(case), case
            chosen.add((case.device, kernel))
        assert len(chosen) == 7  # bmm and loop on both devices, grouped, triton and sliced on one

    @pytest.mark.parametrize("index", range(len(CHOICES)))
    def test_every_row_is_needed(self, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
        monkeypatch.setattr(kernels, "CHOICES", CHOICES[:index] + CHOICES[index + 1 :])
        with pytest.raises((AssertionError, StopIteration)):
            self.test_choices_are_those_of_today(monkeypatch)

    @pytest.mark.parametrize(
        "condition",
        [
            {"device": "cuda"},
            {"dtypes": (torch.float16, torch.bfloat16)},
            {"row_bytes": 64},
            {"max_experts": 8},
            {"min_matrix_numel": 128 * 64},
            {"fixed_rows": True},
            {"fixed_rows": True, "max_expert_flops": 2 * 16 * 2 * 128 * 60},
            {"activation_dropout": True},
            {"device": "cuda", "min_capability": (8, 0)},
        ],
        ids=str,
    )
    def test_a_condition_keeps_its_row_from_being_taken(
        self, monkeypatch: pytest.MonkeyPatch, condition: dict[str, Any]
    ) -> None:
        # One case of which the condition holds, and one of which it does not.
        monkeypatch.setattr(kernels, "CHOICES", (Choice(Kernel.GROUPED, **condition), Choice(Kernel.LOOP)))
        monkeypatch.setattr(kernels, "_cuda_capability", lambda device: (8, 6))
        fits = described("cuda", torch.bfloat16, (8, 128, 64))
        small = described("cpu", torch.float32, (9, 130, 60))
        if "max_expert_flops" in condition:
            assert choose_kernel(small, rows_per_expert=15) is Kernel.GROUPED
            assert choose_kernel(small, rows_per_expert=16) is Kernel.LOOP
            return
        assert choose_kernel(fits, rows_per_expert=16, activation_dropout=0.1) is Kernel.GROUPED
        assert choose_kernel(small) is Kernel.LOOP

    def test_every_kernel_has_a_function_of_one_signature(self) -> None:
        assert list(KERNELS) == list(Kernel)
        signatures = {str(inspect.signature(function)) for function in KERNELS.values()}
        assert len(signatures) == 1

    def test_a_further_kernel_is_a_function_and_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def negated(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
            return -sliced_network(source_SD, stacks, work, network)

        monkeypatch.setitem(KERNELS, "negated", negated)  # type: ignore[arg-type]
        monkeypatch.setattr(kernels, "CHOICES", (Choice("negated", max_experts=L), *CHOICES))  # type: ignore[arg-type]
        rows, stacks, work = rows_of(COUNTS["some"]), stacks_of(), ExpertWork(counts_L=COUNTS["some"])
        out = run_experts(choose_kernel(stacks), rows, stacks, work, activation=F.gelu)
        assert out.equal(-run_experts(Kernel.SLICED, rows, stacks, work, activation=F.gelu))

    def test_sliced_refuses_to_ignore_the_dropout_of_activations(self) -> None:
        with pytest.raises(
            ValueError, match=r"'sliced' cannot drop values .* 0\.1; choose_kernel takes 'loop'"
        ):
            run_experts(
                Kernel.SLICED,
                rows_of(COUNTS["some"]),
                stacks_of(),
                ExpertWork(counts_L=COUNTS["some"]),
                activation=F.gelu,
                activation_dropout=0.1,
            )


class TestChoice:
    def test_cpu(self) -> None:
        stacks = stacks_of()
        assert choose_kernel(stacks) is Kernel.SLICED
        assert choose_kernel(stacks, activation_dropout=0.1) is Kernel.LOOP
        assert choose_kernel(stacks, rows_per_expert=16) is Kernel.BMM
        assert choose_kernel(stacks, rows_per_expert=10**6) is Kernel.SLICED

    @pytest.mark.parametrize(
        ("dtype", "capability", "model_dim", "rows_per_expert", "expected"),
        [
            (torch.bfloat16, (9, 0), 64, None, Kernel.GROUPED),
            (torch.bfloat16, (9, 0), 60, None, Kernel.TRITON),
            (torch.bfloat16, (8, 0), 64, None, Kernel.TRITON),
            (torch.float32, (9, 0), 64, None, Kernel.TRITON),
            (torch.float16, (9, 0), 1 << 17, None, Kernel.LOOP),
            (torch.float64, (9, 0), 64, None, Kernel.LOOP),
            (torch.float32, (8, 0), 64, 16, Kernel.BMM),
        ],
    )
    def test_cuda(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        capability: tuple[int, int],
        model_dim: int,
        rows_per_expert: int | None,
        expected: Kernel,
    ) -> None:
        monkeypatch.setattr(kernels, "_cuda_capability", lambda device: capability)
        stacks = described("cuda", dtype, (2, 128, model_dim))
        assert choose_kernel(stacks, rows_per_expert=rows_per_expert) is expected

    def test_float32_and_float64_are_multiplied_as_they_are(self) -> None:
        assert arithmetic_dtype(torch.empty(1)) is torch.float32
        assert arithmetic_dtype(torch.empty(1, dtype=torch.float64)) is torch.float64

    @pytest.mark.parametrize(("has_units", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_bfloat16_goes_by_the_processor(
        self, monkeypatch: pytest.MonkeyPatch, has_units: bool, expected: torch.dtype
    ) -> None:
        monkeypatch.setattr(kernels, "_cpu_multiplies", lambda dtype: has_units)
        assert arithmetic_dtype(torch.empty(1, dtype=torch.bfloat16)) is expected
