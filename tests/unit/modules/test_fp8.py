"""Experts in FP8: emulation within what the format allows, in output and every gradient; when used, and refused."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.moe_checks import moe_problems
from fairseq_moe.fused import quantize_rows as quantize_rows_module
from fairseq_moe.fused.quantize_rows import quantize_rows
from fairseq_moe.modules.dispatch.rows import ExpertWork, plan_rows, take_weights
from fairseq_moe.modules.kernels import fp8
from fairseq_moe.modules.kernels.contract import Stacks
from fairseq_moe.modules.kernels.fp8 import Fp8Mode, Fp8Products, fp8_note, runs_fp8
from fairseq_moe.modules.kernels.products import LoopProducts
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu, is_gated, swiglu
from fairseq_moe.modules.kernels.table import Kernel, choose_kernel, run_experts
from fairseq_moe.modules.routing.contract import RoutingDecision

COUNTS = (5, 0, 17, 3)
L, D, H = len(COUNTS), 32, 48
T = 20


@pytest.fixture(params=["twins", "kernels"])
def _with_and_without_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernels":
        pytest.importorskip("triton")
        monkeypatch.setattr(quantize_rows_module, "runs_triton", lambda *tensors: True)  # this kernel alone


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def products_of(mode: Fp8Mode) -> Fp8Products:
    wide = LoopProducts(COUNTS, wide=torch.float32)
    return Fp8Products(mode, wide, torch.tensor(COUNTS).cumsum(0).int(), is_sized=True)


@pytest.mark.usefixtures("_with_and_without_triton")
def test_products_are_within_the_bound_of_the_format() -> None:
    """Each factor is off by a sixteenth at most, or by 2^-10 of its scale; a sum of products by those of its terms."""
    products, x, grad, weight = products_of(Fp8Mode.EMULATE), random(25, D), random(25, H), random(L, H, D)
    for found, rows, matrices in (
        (products.outputs(x, weight), x, weight.transpose(1, 2)),
        (products.grad_rows(grad, weight), grad, weight),
    ):
        start = 0
        for count, matrix in zip(COUNTS, matrices.double(), strict=True):
            part = rows[start : start + count].double()
            row_error = torch.maximum(part.abs() / 16, part.abs().amax(1, keepdim=True) / 448 / 1024)
            matrix_error = torch.maximum(matrix.abs() / 16, matrix.abs().amax(0, keepdim=True) / 448 / 1024)
            bound = row_error @ (matrix.abs() + matrix_error) + part.abs() @ matrix_error
            off = (found[start : start + count].double() - part @ matrix).abs()
            assert (off <= bound * 1.001 + 1e-6).all()
            # And it is FP8: most values are off by more than another precision would be.
            assert count == 0 or (off > 1e-4).double().mean() > 0.9
            start += count
    exact = LoopProducts(COUNTS, wide=torch.float32).grad_weight(grad, x)
    assert torch.equal(products.grad_weight(grad, x), exact)


@pytest.mark.parametrize("mode", Fp8Mode)
def test_without_rows_nothing_is_multiplied(mode: Fp8Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", None)
    products = Fp8Products(
        mode, LoopProducts((0,) * L, wide=torch.float32), torch.zeros(L).int(), is_sized=True
    )
    weight = random(L, H, D).bfloat16()
    assert products.outputs(torch.empty(0, D).bfloat16(), weight).shape == (0, H)
    assert products.grad_rows(torch.empty(0, H).bfloat16(), weight).shape == (0, D)


def test_emulation_is_as_wide_as_its_rows() -> None:
    products = Fp8Products(
        Fp8Mode.EMULATE,
        LoopProducts(COUNTS, wide=torch.float64),
        torch.tensor(COUNTS).cumsum(0).int(),
        is_sized=True,
    )
    x, weight = random(25, D).double(), random(L, H, D).double()
    y = products.outputs(x, weight)
    # Off by what was quantised, and by no rounding to float32.
    values, scales = quantize_rows(x)
    matrix, matrix_scales = quantize_rows(weight.view(-1, D))
    matrix = (matrix.double() * matrix_scales.double().unsqueeze(1)).view(L, H, D)
    rows = (values.double() * scales.double().unsqueeze(1)).split(COUNTS)
    expected = torch.cat([part @ one.t() for part, one in zip(rows, matrix, strict=True)])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "swiglu": swiglu,
    # A limit that no value is near: there the derivative jumps, and what is rounded may lie on the other side.
    "clamped swiglu, biased": ClampedSwiglu(alpha=1.702, limit=3.0),
}


def leaves_of(activation: str, dtype: torch.dtype) -> list[Tensor]:
    width = 2 * H if is_gated(ACTIVATIONS[activation]) else H
    biases = [] if activation == "swiglu" else [(L, width), (L, D)]
    shapes = [(T, D), (T, 2), (L, width, D), (L, D, H), *biases]
    leaves = [random(*shape).mul(0.3).to(dtype) for shape in shapes]
    leaves[1] = leaves[1].abs()
    return [leaf.requires_grad_() for leaf in leaves]


def run(leaves: list[Tensor], activation: str, kernel: Kernel) -> tuple[Tensor, ...]:
    ids = torch.stack([torch.randperm(L, generator=torch.Generator().manual_seed(t))[:2] for t in range(T)])
    kept = torch.rand(T, 2, generator=torch.Generator().manual_seed(1)) > 0.2
    decision = RoutingDecision.counted(
        expert_ids_TK=ids, requested_TK=kept, kept_TK=kept, num_experts=L, capacity=None
    )
    plan = plan_rows(decision)
    work = ExpertWork(counts_L=decision.counts.kept_E, plan=plan, weights_R=take_weights(leaves[1], plan))
    b1, b2 = leaves[4:] or (None, None)
    y = run_experts(
        kernel,
        leaves[0],
        Stacks(leaves[2], b1, leaves[3], b2),
        work,
        activation=ACTIVATIONS[activation],
        fp8=Fp8Mode.EMULATE,
    )
    return y.detach(), *torch.autograd.grad(
        y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    )


@pytest.mark.parametrize(
    ("activation", "dtype", "_with_and_without_triton"),
    [
        *itertools.product(ACTIVATIONS, [torch.float32, torch.bfloat16], ["twins"]),
        ("swiglu", torch.bfloat16, "kernels"),
    ],
    indirect=["_with_and_without_triton"],
)
@pytest.mark.usefixtures("_with_and_without_triton")
def test_a_network_is_near_that_of_full_precision(activation: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(activation, dtype)
    found = run(leaves, activation, Kernel.FP8)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for a, b in zip(found, run(exact, activation, Kernel.LOOP), strict=True):
        assert a.dtype is dtype
        # Errors of products are independent, so a norm is off by far less than the worst case of one of them.
        assert (a.double() - b).norm() <= 0.08 * b.norm()
    assert (found[0].double() - run(exact, activation, Kernel.LOOP)[0]).norm() > 1e-3


def test_what_is_no_product_of_an_expert_stays_in_its_precision() -> None:
    """The gradient of a routing weight is a product's but for g . b2, which is none."""
    leaves = leaves_of("gelu", torch.float32)
    with torch.no_grad():
        leaves[3].zero_()
    found, expected = (run(leaves, "gelu", kernel)[2] for kernel in (Kernel.FP8, Kernel.LOOP))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected)


def test_the_call_of_the_native_product_fits_its_layout() -> None:
    """On the meta device, where torch checks dtypes, shapes and strides as on a GPU."""
    products = Fp8Products(
        Fp8Mode.NATIVE,
        LoopProducts(COUNTS, wide=torch.bfloat16),
        torch.empty(L, dtype=torch.int32, device="meta"),
        is_sized=True,
    )

    def quantised(*shape: int) -> tuple[Tensor, Tensor]:
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        return values, torch.empty(shape[:-1], device="meta")

    like = torch.empty(25, D, dtype=torch.bfloat16, device="meta")
    y = products._product(quantised(25, D), quantised(L, H, D), like=like)
    assert y.shape == (25, H) and y.dtype is torch.bfloat16


class OnGpu:
    """A stack of parameters on a GPU."""

    is_cuda = True

    def __init__(self, *widths: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape = (8, *widths)
        self.dtype = dtype


class TestWhen:
    @staticmethod
    def runs(*widths: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        weight = OnGpu(*widths, dtype=dtype)
        return runs_fp8(Fp8Mode.NATIVE, Stacks(weight, None, weight, None))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("widths", "expected"),
        [((4096, 14336), True), ((4096, 4096), True), ((2048, 8192), False), ((2048, 1408), False)],
    )
    def test_native_goes_by_the_measured_table(
        self, widths: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fp8, "native_problem", lambda: None)
        assert self.runs(*widths) is expected
        assert ("are multiplied in FP8" in fp8_note(Fp8Mode.NATIVE, *widths)) is expected

    def test_a_model_that_is_evaluated_otherwise_is_computed_as_it_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Loaded in float32, on a GPU without FP8, or with widths that training would have refused."""
        monkeypatch.setattr(fp8, "native_problem", lambda: None)
        assert self.runs(4096, 4096, dtype=torch.float16)
        assert not self.runs(4096, 4096, dtype=torch.float32)
        assert not self.runs(4096, 4104)
        monkeypatch.setattr(fp8, "native_problem", lambda: "none")
        assert not self.runs(4096, 4096)

    def test_where_there_is_no_fp8_a_model_is_computed_as_it_is(self) -> None:
        stacks = Stacks(torch.empty(2, 8, 4096), None, torch.empty(2, 4096, 8), None)
        assert choose_kernel(stacks, fp8=Fp8Mode.NATIVE) is Kernel.SLICED
        assert choose_kernel(stacks, fp8=Fp8Mode.EMULATE) is Kernel.FP8


class TestRefusals:
    @staticmethod
    def problems(*, common: dict[str, bool] | None = None, **flags: object) -> list[str]:
        shape = {"decoder_layers": 2, "decoder_embed_dim": 64, "decoder_ffn_embed_dim": 96}
        model = {"moe_freq": 2, "moe_expert_count": 4, **shape, **flags}
        cfg = SimpleNamespace(
            model=SimpleNamespace(**model),
            criterion=SimpleNamespace(),
            common=SimpleNamespace(
                **{
                    "bf16": True,
                    "fp16": False,
                    "memory_efficient_fp16": False,
                    "fp16_no_flatten_grads": True,
                    **(common or {}),
                }
            ),
            distributed_training=SimpleNamespace(ddp_backend="legacy_ddp"),
        )
        return [text for text in moe_problems(cfg, world_size=1) if "fp8" in text]

    @pytest.fixture
    def capability(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
        """Set the compute capability of a GPU that is there."""

        def set_it(*capability: int) -> None:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        set_it(9, 0)
        return set_it

    def test_native_needs_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        (text,) = self.problems(moe_fp8="native")
        assert text.startswith("--moe-fp8 native cannot be honoured: this process has no CUDA device;")
        assert self.problems(moe_fp8="emulate", common={"bf16": False}, decoder_ffn_embed_dim=72) == []

    @pytest.mark.usefixtures("capability")
    def test_a_run_on_the_cpu_beside_a_gpu(self) -> None:
        assert self.problems(moe_fp8="native") == []
        (text,) = self.problems(moe_fp8="native", common={"cpu": True})
        assert "--cpu keeps this run from the GPU" in text

    @pytest.mark.parametrize("has", [(8, 0), (8, 9), (12, 0)])
    def test_other_devices(self, has: tuple[int, int], capability: Callable[[int, int], None]) -> None:
        capability(*has)
        (text,) = self.problems(moe_fp8="native")
        assert f"the device has compute capability {has[0]}.{has[1]}, expected 9.x or 10.x" in text

    @pytest.mark.usefixtures("capability")
    def test_a_torch_without_the_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(torch, "_scaled_grouped_mm")
        (text,) = self.problems(moe_fp8="native")
        assert "has no scaled grouped product" in text

    @pytest.mark.usefixtures("capability")
    @pytest.mark.parametrize(
        "flags",
        [
            {"decoder_ffn_embed_dim": 72},
            {"moe_expert_ffn_dim": 72},
            {"moe_ffn_hidden_size": 72, "num_experts": 4},
        ],
    )
    def test_widths(self, flags: dict[str, int]) -> None:
        if "num_experts" in flags:
            flags = {"moe_freq": 0, "moe_expert_count": 0, **flags}
        (text,) = self.problems(moe_fp8="native", **flags)
        assert "the widths 64 (model) and 72 (expert) must be multiples of 16" in text

    @pytest.mark.usefixtures("capability")
    def test_precision(self) -> None:
        for flag in ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16"):
            assert self.problems(moe_fp8="native", common={"bf16": False, flag: True}) == []
        (text,) = self.problems(moe_fp8="native", common={"bf16": False})
        assert "parameters are float32" in text and "--memory-efficient-bf16" in text

    @pytest.mark.usefixtures("capability")
    def test_every_reason_at_once(self, capability: Callable[[int, int], None]) -> None:
        capability(8, 0)
        common = {"bf16": False, "cpu": False}
        assert len(self.problems(moe_fp8="native", common=common, decoder_ffn_embed_dim=72)) == 3

    def test_other_words_and_models_without_experts(self) -> None:
        assert "expected one of native, emulate" in self.problems(moe_fp8="on")[0]
        assert "no layer has any" in self.problems(moe_fp8="emulate", moe_freq=0, moe_expert_count=0)[0]
        assert MoEConfig.from_args({"moe_fp8": None}).fp8 is None
