"""Activations with bias and weight: kernel, twin and a formula in float64 agree, in value and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused.weighted_activation import (
    ActivationKind,
    Clamp,
    weighted_activation,
    weighted_activation_backward,
    weighted_activation_backward_slowly,
    weighted_activation_slowly,
)

# All arithmetic is in float32, so a result differs from that in float64 by one rounding to its own dtype, and a little.
# To bfloat16 the interpreter (triton 3.9) rounds towards zero: twice the error of the nearest.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7 + 1e-5, torch.float16: 2**-11 + 1e-5}
L = 3
CLAMP = Clamp(alpha=1.702, limit=0.75)  # which half of the values exceed
PAIRS = (
    (weighted_activation, weighted_activation_backward),
    (weighted_activation_slowly, weighted_activation_backward_slowly),
)


class Case:
    """Random values of one shape; ``nobodys`` rows behind the last one hold NaN."""

    def __init__(
        self,
        kind: str,
        rows: int,
        width: int,
        dtype: torch.dtype,
        *,
        biased: bool,
        weighted: bool,
        nobodys: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.kind, self.rows = ActivationKind(kind), rows
        self.hidden = random(rows + nobodys, 2 * width if self.kind.is_gated else width)
        self.grad = random(rows + nobodys, width)
        for values in (self.hidden, self.grad):
            values[rows:] = float("nan")
        self.options = {
            "bias_LH": random(L, self.hidden.shape[1]) if biased else None,
            "expert_R": torch.arange(rows + nobodys) * L // (rows + nobodys + 1) if biased else None,
            "weights_R": random(rows + nobodys).abs() if weighted else None,
        }
        if self.kind is ActivationKind.CLAMPED_SWIGLU:
            self.options["clamp"] = CLAMP
        self.num_rows = torch.tensor(rows) if nobodys else None

    def exact(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """By autograd in float64, from a formula of its own."""
        hidden = self.hidden[: self.rows].double().requires_grad_()
        weights = self.options["weights_R"]
        weights = None if weights is None else weights[: self.rows].double().requires_grad_()
        x = hidden
        if self.options["bias_LH"] is not None:
            x = x + self.options["bias_LH"].double()[self.options["expert_R"][: self.rows]]
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=1)
            active = gate / (1 + torch.exp(-gate)) * up
        elif self.kind == "clamped_swiglu":
            gate, up = x.chunk(2, dim=1)
            gate = torch.where(gate > CLAMP.limit, CLAMP.limit, gate)
            up = torch.where(up.abs() > CLAMP.limit, CLAMP.limit * up.sign().detach(), up)
            active = gate / (1 + torch.exp(-CLAMP.alpha * gate)) * (1 + up)
        else:
            active = {"gelu": F.gelu, "relu": lambda h: h * (h > 0)}[str(self.kind)](x)
        if weights is not None:
            active = active * weights.unsqueeze(1)
        leaves = [hidden] if weights is None else [hidden, weights]
        grads = torch.autograd.grad(active, leaves, self.grad[: self.rows].double())
        return active.detach(), grads[0], grads[1] if weights is not None else None

    def check(self, found: tuple[Tensor, Tensor, Tensor | None]) -> None:
        weights = self.options["weights_R"]
        dtypes = self.hidden.dtype, self.hidden.dtype, None if weights is None else weights.dtype
        for a, b, dtype in zip(found, self.exact(), dtypes, strict=True):
            if b is None:
                assert a is None
                continue
            assert a is not None and a.dtype is dtype
            # What is absolute: a row's sum in float32 may cancel, and float16 has few digits near zero.
            torch.testing.assert_close(a[: self.rows].double(), b, atol=2e-5, rtol=TOLERANCE[a.dtype])


@pytest.mark.parametrize(("biased", "weighted"), [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ActivationKind)
@pytest.mark.parametrize(("rows", "width"), [(9, 70), (1, 5), (0, 8), (3, 1100)])
def test_values_and_gradients(
    rows: int, width: int, kind: str, dtype: torch.dtype, biased: bool, weighted: bool
) -> None:
    case = Case(kind, rows, width, dtype, biased=biased, weighted=weighted)
    for forward, backward in PAIRS:
        active = forward(case.kind, case.hidden, **case.options)
        again, *grads = backward(case.kind, case.grad, case.hidden, **case.options)
        case.check((active, *grads))
        case.check((again, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ActivationKind)
def test_each_result_has_the_dtype_of_what_it_belongs_to(kind: str, dtype: torch.dtype) -> None:
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    case = Case(kind, 4, 6, dtype, biased=True, weighted=True)
    case.grad = case.grad.to(other)
    for name in ("bias_LH", "weights_R"):
        case.options[name] = case.options[name].to(other)
    for forward, backward in PAIRS:
        active = forward(case.kind, case.hidden, **case.options)
        again, *grads = backward(case.kind, case.grad, case.hidden, **case.options)
        case.check((active, *grads))
        case.check((again, *grads))


@pytest.mark.parametrize("kind", ActivationKind)
@pytest.mark.parametrize(("rows", "width"), [(5, 6), (0, 6), (2, 1500)])
def test_rows_that_are_nobodys_reach_nothing(rows: int, width: int, kind: str) -> None:
    case = Case(kind, rows, width, torch.float32, biased=True, weighted=True, nobodys=3)
    active = weighted_activation(case.kind, case.hidden, **case.options, num_rows=case.num_rows)
    for backward in (weighted_activation_backward, weighted_activation_backward_slowly):
        again, *grads = backward(case.kind, case.grad, case.hidden, **case.options, num_rows=case.num_rows)
        case.check((active, *grads))
        case.check((again, *grads))
        assert grads[1] is not None and not grads[1][rows:].any()


@pytest.mark.parametrize("kind", ActivationKind)
def test_nan_in_a_row_that_is_somebodys_stays_visible(kind: str) -> None:
    # Whoever looks for overflows must find them behind an activation too; a GPU's maximum of NaN and 0 is 0.
    case = Case(kind, 3, 4, torch.float32, biased=False, weighted=True)
    case.hidden[1] = float("nan")
    active = weighted_activation(case.kind, case.hidden, **case.options)
    again, grad_hidden, grad_weights = weighted_activation_backward(
        case.kind, case.grad, case.hidden, **case.options
    )
    for values in (active, again, grad_weights):
        assert values is not None
        assert values[1].isnan().all() and values[[0, 2]].isfinite().all()
    _, expected, _ = weighted_activation_backward_slowly(case.kind, case.grad, case.hidden, **case.options)
    torch.testing.assert_close(grad_hidden, expected, equal_nan=True)


def strided(values: Tensor) -> Tensor:
    """The same values as every second column of a wider tensor, with NaN, or an expert there is not, between."""
    between = torch.full_like(values, float("nan") if values.is_floating_point() else L)
    return torch.stack([values, between], dim=-1)[..., 0]


@pytest.mark.parametrize("kind", ActivationKind)
def test_strange_strides(kind: str) -> None:
    case = Case(kind, 5, 6, torch.float32, biased=True, weighted=True)
    options = {
        name: strided(values) if isinstance(values, Tensor) else values
        for name, values in case.options.items()
    }
    case.grad = torch.ones(1, 1).expand(5, 6)
    for hidden in (strided(case.hidden), case.hidden.t().contiguous().t()):
        assert not hidden.is_contiguous() and not any(
            v.is_contiguous() for v in options.values() if isinstance(v, Tensor)
        )
        for forward, backward in PAIRS:
            active = forward(case.kind, hidden, **options)
            again, *grads = backward(case.kind, case.grad, hidden, **options)
            case.check((active, *grads))
            case.check((again, *grads))


@pytest.mark.parametrize("kind", ActivationKind)
def test_zero_and_large_values(kind: str) -> None:
    hidden = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0], [0.0, -0.0, 1e4, -1e4, 0.0, -90.0]])
    grad, clamp = torch.ones(2, 3 if ActivationKind(kind).is_gated else 6), Clamp(alpha=1.702, limit=90.0)
    found = weighted_activation_backward(ActivationKind(kind), grad, hidden, clamp=clamp)[:2]
    expected = weighted_activation_backward_slowly(ActivationKind(kind), grad, hidden, clamp=clamp)[:2]
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_derivative_at_the_bounds_of_a_clamp_and_beyond() -> None:
    # As torch.clamp's: 1 at a bound, 0 beyond it, and nothing of a NaN, which the value keeps.
    limit, nan = CLAMP.limit, float("nan")
    gates = torch.tensor([limit, limit + 1e-6, -limit - 1e-6, nan, float("inf"), 0.5])
    ups = torch.tensor([limit, -limit, limit + 1e-6, -limit - 1e-6, nan, float("inf"), -float("inf"), 0.5])
    gate, up = (values.flatten().double() for values in torch.meshgrid(gates, ups, indexing="ij"))
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    held_gate, held_up = leaves[0].clamp(max=limit), leaves[1].clamp(-limit, limit)
    values = held_gate / (1 + torch.exp(-CLAMP.alpha * held_gate)) * (1 + held_up)
    expected = torch.cat(torch.autograd.grad(values, leaves, torch.ones_like(values)))
    assert (expected[:48] == 0).any() and (expected[48:] == 0).any()
    hidden, grad = torch.cat([gate, up]).float().unsqueeze(0), torch.ones(1, len(gate))
    for _, backward in PAIRS:
        active, grad_hidden, _ = backward(ActivationKind.CLAMPED_SWIGLU, grad, hidden, clamp=CLAMP)
        torch.testing.assert_close(active[0], values.detach().float(), equal_nan=True)
        torch.testing.assert_close(grad_hidden[0], expected.float(), equal_nan=True)
        assert active.isnan().any()
