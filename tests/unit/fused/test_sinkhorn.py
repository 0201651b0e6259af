"""Sinkhorn's plan: kernels, twin and an iteration in plain Python agree, also about when to stop."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused import sinkhorn
from fairseq_moe.fused.sinkhorn import sinkhorn_plan, sinkhorn_plan_slowly
from tests.helpers import slow_routing


def logits_of(num_tokens: int, num_experts: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    return scale * torch.randn(num_tokens, num_experts, generator=generator)


@pytest.fixture(autouse=True)
def _fewer_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow; where it matters, a test asks for all of them."""
    monkeypatch.setattr(sinkhorn, "_MAX_ITERATIONS", 5)


def check(logits: Tensor, padding: Tensor | None = None) -> Tensor:
    found, expected = (
        sinkhorn_plan(logits, padding_T=padding),
        sinkhorn_plan_slowly(logits, padding_T=padding),
    )
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=2e-5)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (9, 1), (21, 8), (30, 100)], ids=str)
def test_plans(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(logits_of(*shape).to(dtype))
    check(logits_of(*shape).to(dtype), torch.arange(shape[0]) % 3 == 1)


def test_padding_alone() -> None:
    assert not check(logits_of(6, 4), torch.ones(6, dtype=torch.bool)).any()


def test_several_tiles_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn, "_TILE", 16)
    monkeypatch.setattr(sinkhorn, "_MOST_PROGRAMS", 5)
    monkeypatch.setattr(sinkhorn, "_ROWS", 2)
    check(logits_of(13, 8), torch.arange(13) > 10)


def test_the_plan_is_that_of_a_slow_iteration_and_balances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn, "_MAX_ITERATIONS", 20)
    logits = logits_of(24, 6)
    plan = sinkhorn_plan(logits)
    torch.testing.assert_close(
        plan.double(), torch.tensor(slow_routing.sinkhorn(logits)).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6), atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 40.0])
def test_iterations_stop_where_the_twins_do(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, in between, and never; one that is cut off elsewhere has another plan."""
    logits = logits_of(24, 6, scale)
    plans = []
    for iterations in (1, 3, 20):
        monkeypatch.setattr(sinkhorn, "_MAX_ITERATIONS", iterations)
        plans.append(check(logits))
        check(logits, torch.arange(24) % 4 > 0)  # T tells the factors of experts, and so when they are still
    assert torch.equal(plans[0], plans[2]) is (scale == 0.0)


def test_logits_that_are_not_contiguous_or_large() -> None:
    check(logits_of(20, 12)[::2, ::2])
    assert sinkhorn_plan(logits_of(24, 8, 400.0)).isfinite().all()
