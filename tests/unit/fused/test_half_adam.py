"""Adam with half-precision moments by its kernel: near the slow path, rounded at random, the same on every replica."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_moe.fused import launch
from fairseq_moe.optim import HalfAdam

SHAPES = [(40, 70), (5,), (), (0,), (4100,)]


def make(dtype: torch.dtype, **options: Any) -> HalfAdam:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    parameters.append(nn.Parameter(torch.randn(3).to(dtype)))  # never gets a gradient
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 3e-3, "betas": (0.8, 0.9)}]
    return HalfAdam(groups, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, **options)


def give_gradients(optimizer: HalfAdam, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.shape != (3,):
                p.grad = (torch.randn(p.shape, generator=generator) * factor).to(p.dtype)


def run(optimizer: HalfAdam, *, steps: int = 3, factor: float = 1.0) -> HalfAdam:
    for seed in range(steps):
        give_gradients(optimizer, seed, 1 / factor)
        if factor != 1.0:
            optimizer.scale_gradients(factor)
        optimizer.step()
    return optimizer


def moments(optimizer: HalfAdam) -> list[dict[str, Any]]:
    return list(optimizer.state_dict()["state"].values())


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Callable[[HalfAdam], HalfAdam]:
    """Run an optimizer's steps by the slow path."""

    def run_slowly(optimizer: HalfAdam) -> HalfAdam:
        with monkeypatch.context() as patch:
            patch.setattr(launch, "DEVICES", {"cuda"})
            return run(optimizer)

    return run_slowly


@pytest.mark.parametrize("factor", [1.0, 0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_are_those_of_the_slow_path_but_for_the_last_place(
    dtype: torch.dtype, factor: float, slowly: Callable[[HalfAdam], HalfAdam]
) -> None:
    slow, fast = slowly(make(dtype)), run(make(dtype), factor=factor)
    for expected, found in zip(moments(slow), moments(fast), strict=True):
        assert expected["step"] == found["step"] == 3
        torch.testing.assert_close(found["exp_avg"], expected["exp_avg"], atol=1e-3, rtol=1e-3)
        # The root is rounded up or down by one place of half precision in each step.
        torch.testing.assert_close(found["exp_avg_sq"], expected["exp_avg_sq"], atol=0.0, rtol=8 * 2.0**-10)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}[dtype]
    for group, expected_group in zip(fast.param_groups, slow.param_groups, strict=True):
        for p, expected in zip(group["params"], expected_group["params"], strict=True):
            torch.testing.assert_close(p, expected, atol=tolerance, rtol=tolerance)


def test_replicas_stay_equal_and_a_state_survives_the_round_trip() -> None:
    first, second = run(make(torch.float32)), run(make(torch.float32))
    third = make(torch.float32)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    for group, other in zip(first.param_groups, third.param_groups, strict=True):
        for p, copied in zip(group["params"], other["params"], strict=True):
            copied.data.copy_(p.data)
    for optimizer in (first, second, third):
        run(optimizer, steps=2)
    for other in (second, third):
        for a, b in zip(moments(first), moments(other), strict=True):
            assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_rounding_is_right_on_average_and_never_to_zero() -> None:
    """The second moment moves by less than half a place per step: rounded to nearest it would stand still."""
    p = nn.Parameter(torch.ones(4096))
    optimizer = HalfAdam([p], lr=0.0, betas=(0.9, 0.9999))
    p.grad = torch.ones_like(p)
    for _ in range(30):
        optimizer.step()
    found: Tensor = moments(optimizer)[0]["exp_avg_sq"]
    assert float(found.mean()) == pytest.approx(1 - 0.9999**30, rel=2e-3)
    tiny = nn.Parameter(torch.ones(2))
    optimizer = HalfAdam([tiny])
    tiny.grad = torch.tensor([1.0, 1e-15])
    optimizer.step()
    assert (optimizer.state[tiny]["root"] > 0).all()


def test_the_largest_values_that_the_kernel_notes_are_those_it_stores() -> None:
    optimizer = run(make(torch.bfloat16))
    for state in optimizer.state.values():
        expected = [state["exp_avg"].abs().max(), state["root"].max()]
        assert state["largest_2"].tolist() == [float(value) for value in expected]
