"""Kernels of routing with few and with a thousand experts, where near ties of computed scores may fall either way."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused.sinkhorn import sinkhorn_plan, sinkhorn_plan_slowly
from fairseq_moe.fused.sort_rows import sort_assignments, sort_assignments_slowly
from fairseq_moe.fused.top_k import Scoring, top_k, top_k_slowly

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
T, K = 2048, 4


def random(*shape: int, dtype: torch.dtype, cuda: torch.device) -> Tensor:
    generator = torch.Generator(cuda).manual_seed(sum(shape))
    return torch.randn(shape, device=cuda, generator=generator).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(2048, 4, 100), (131072, 8, 1024), (1, 2, 5)]
)
def test_sorted_assignments(num_tokens: int, top_k: int, num_experts: int, cuda: torch.device) -> None:
    ids_TK = torch.randint(num_experts, (num_tokens, top_k), device=cuda)
    kept_TK = torch.rand(num_tokens, top_k, device=cuda) < 0.9
    found = sort_assignments(ids_TK, kept_TK, num_experts=num_experts)
    for one, other in zip(
        found, sort_assignments_slowly(ids_TK, kept_TK, num_experts=num_experts), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["chosen", "softmax", "sigmoid"])
@pytest.mark.parametrize("num_experts", [8, 100, 1024])
def test_choice(num_experts: int, kind: str, dtype: torch.dtype, cuda: torch.device) -> None:
    scoring = Scoring(kind=kind, top_k=K, scale=2.0)
    logits = random(T, num_experts, dtype=dtype, cuda=cuda)
    padding_T = torch.arange(T, device=cuda) % 7 == 3
    found = top_k(logits, scoring, padding_T=padding_T)
    expected = top_k_slowly(logits, scoring, padding_T=padding_T)
    # Scores that are computed differ in their last bit, so near ties may fall the other way.
    same = (found.ids_TK == expected.ids_TK).double().mean()
    assert same == 1 if kind == "chosen" else same > 0.99
    assert found.histogram_34E is not None and int(found.histogram_34E.sum()) == T * K
    for fate, of_fate_T in ((0, ~padding_T), (3, padding_T)):
        counts_E = torch.bincount(found.ids_TK[of_fate_T].flatten(), minlength=num_experts)
        assert torch.equal(found.histogram_34E[:, fate].sum(0), counts_E)
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    grads = random(T, K, dtype=dtype, cuda=cuda), random(T, num_experts, dtype=torch.float32, cuda=cuda)
    results = []
    for of, leaf in ((top_k, mine), (top_k_slowly, theirs)):
        again = of(leaf, scoring, padding_T=padding_T, ids_TK=found.ids_TK)
        torch.autograd.backward([again.weights_TK, again.gates_TE], list(grads))
        results.append([again.weights_TK, again.gates_TE, again.entropy_T, leaf.grad])
    for one, other in zip(*results, strict=True):
        close(one.detach(), other.detach(), dtype)


@pytest.mark.parametrize("num_experts", [8, 100, 1024])
def test_plans_of_sinkhorn(num_experts: int, cuda: torch.device) -> None:
    logits = random(T, num_experts, dtype=torch.float32, cuda=cuda)
    for padding_T in (None, torch.arange(T, device=cuda) % 5 == 0):
        found = sinkhorn_plan(logits, padding_T=padding_T)
        expected = sinkhorn_plan_slowly(logits, padding_T=padding_T)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-3)
