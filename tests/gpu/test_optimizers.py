"""Adam by kernels on a GPU: stock's step within one rounding, half-precision state near its slow path, no wait."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fairseq_moe.fused import launch
from fairseq_moe.optim import HalfAdam

# One unit in the last place of a number near 1.
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# An odd number of elements, one that is divisible by 16, a scalar, and nothing.
SHAPES = [(3_000_001,), (1024, 2048), (), (0,)]


def parameters(dtype: torch.dtype, cuda: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator(cuda).manual_seed(0)
    return [nn.Parameter(torch.randn(s, device=cuda, generator=generator).to(dtype)) for s in SHAPES]


def give_gradients(held: list[nn.Parameter], seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator(held[0].device).manual_seed(seed)
    for p in held:
        p.grad = (torch.randn(p.shape, device=p.device, generator=generator) * factor).to(p.dtype)


def without_waiting(step: Callable[[], Any], cuda: torch.device) -> None:
    """Run what may not wait for the device."""
    if cuda.type != "cuda":
        step()
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_steps_are_those_of_stock(dtype: torch.dtype, cuda: torch.device) -> None:
    from fairseq.optim.adam import Adam

    from fairseq_moe.optim.one_pass_adam import OnePassAdam, step_in_one_pass

    stock_step = inspect.unwrap(Adam.step)
    stock = Adam(parameters(dtype, cuda), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    ours = copy.deepcopy(stock)
    step_in_one_pass(ours)
    assert type(ours) is OnePassAdam
    held, expected_held = ours.param_groups[0]["params"], stock.param_groups[0]["params"]
    for update in range(4):
        give_gradients(expected_held, update)
        give_gradients(held, update, factor=8.0)

        def step() -> None:
            ours.scale_gradients(0.5)
            ours.scale_gradients(torch.full((), 0.25, device=cuda))
            ours.step()

        stock_step(stock)
        if update == 0:
            step()  # kernels are compiled
        else:
            without_waiting(step, cuda)
        for p, expected in zip(held, expected_held, strict=True):
            torch.testing.assert_close(p, expected, atol=ULP[dtype], rtol=2 * ULP[dtype])
            for name in ("exp_avg", "exp_avg_sq"):
                found, moment = ours.state[p][name], stock.state[expected][name]
                torch.testing.assert_close(found, moment, atol=1e-6, rtol=1e-6)
                found.copy_(moment)
            p.data.copy_(expected)  # each step by itself: one rounding


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_half_precision_state_is_near_its_slow_path(
    dtype: torch.dtype, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = (HalfAdam(parameters(dtype, cuda), lr=0.01, betas=(0.9, 0.98)) for _ in range(2))
    for update in range(3):
        give_gradients(fast.param_groups[0]["params"], update)
        if update == 0:
            fast.step()
        else:
            without_waiting(fast.step, cuda)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "DEVICES", set())
        for update in range(3):
            give_gradients(slow.param_groups[0]["params"], update)
            slow.step()
    states = (optimizer.state_dict()["state"].values() for optimizer in (fast, slow))
    for found, expected in zip(*states, strict=True):
        torch.testing.assert_close(found["exp_avg"], expected["exp_avg"], atol=1e-3, rtol=1e-3)
        # The root is rounded up or down by one place of half precision in each step.
        torch.testing.assert_close(found["exp_avg_sq"], expected["exp_avg_sq"], atol=0.0, rtol=16 * 2.0**-10)
    for state in fast.state.values():
        largest = [float(state["exp_avg"].abs().max()), float(state["root"].max())]
        assert state["largest_2"].tolist() == largest
