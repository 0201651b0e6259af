"""Choice of experts by logits: kernel, twin and a second routing in plain Python agree, and so does every gradient."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused import top_k as module
from fairseq_moe.fused.top_k import Scoring, TopK, top_k, top_k_slowly
from tests.helpers.slow_routing import routes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KINDS = ("chosen", "softmax", "sigmoid")


def logits_of(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    return (2 * torch.randn(num_tokens, num_experts, generator=generator)).to(dtype)


def gradient(of: TopK, logits: Tensor, upper: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Of the logits, where gradients of weights and gates are these, or are none."""
    outputs = [(y, g) for y, g in zip((of.weights_TK, of.gates_TE), upper, strict=True) if g is not None]
    (found,) = torch.autograd.grad(
        [y for y, _ in outputs], logits, [g.to(y.dtype) for y, g in outputs], retain_graph=True
    )
    return found


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def check(
    logits: Tensor, scoring: Scoring, *, bias: Tensor | None = None, padding: Tensor | None = None
) -> None:
    """Everything that the kernel gives, and the gradients of weights and gates, alone and together."""
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = top_k(mine, scoring, bias_E=bias, padding_T=padding)
    expected = top_k_slowly(theirs, scoring, bias_E=bias, padding_T=padding)
    assert torch.equal(found.ids_TK, expected.ids_TK)
    assert found.histogram_34E is not None and expected.histogram_34E is not None
    assert torch.equal(found.histogram_34E, expected.histogram_34E)
    assert found.ids_TK.dtype is found.histogram_34E.dtype is torch.int64
    assert int(found.histogram_34E.sum()) == found.ids_TK.numel()
    assert found.weights_TK.dtype is logits.dtype
    assert found.gates_TE.dtype is found.entropy_T.dtype is torch.float32
    assert not found.entropy_T.requires_grad
    close(found.weights_TK, expected.weights_TK, logits.dtype)
    close(found.gates_TE, expected.gates_TE, torch.float32)
    close(found.entropy_T / 8, expected.entropy_T / 8, torch.float32)  # a sum of E terms
    again = top_k(mine, scoring, bias_E=bias, padding_T=padding, ids_TK=found.ids_TK)
    assert again.ids_TK is found.ids_TK and again.histogram_34E is None
    for one, other in zip(found[:3], again[:3], strict=True):
        assert torch.equal(one, other)
    # The twin's own gradient in float64 is rounded nowhere.
    wide = logits.double().requires_grad_()
    exact = top_k_slowly(wide, scoring, padding_T=padding, ids_TK=found.ids_TK)
    upper = torch.randn(found.weights_TK.shape).to(logits.dtype), torch.randn(logits.shape)
    for given in (upper, (upper[0], None), (None, upper[1])):
        grad = gradient(found, mine, given)
        assert grad.dtype is logits.dtype
        close(grad, gradient(expected, theirs, given), logits.dtype)
        close(grad, gradient(exact, wide, given), logits.dtype)
        assert torch.equal(grad, gradient(again, mine, given))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 1), (8, 2), (100, 6)])
def test_values_and_gradients(num_experts: int, top_k: int, kind: str, dtype: torch.dtype) -> None:
    scoring = Scoring(kind=kind, top_k=top_k, scale=2.5 if top_k > 1 else 1.0)
    bias = torch.linspace(-0.5, 0.5, num_experts) if top_k == 2 else None
    padding = torch.arange(21) % 4 == 1 if top_k > 1 else None
    check(logits_of(21, num_experts, dtype), scoring, bias=bias, padding=padding)


def test_choices_by_probability_with_weights_of_the_chosen_logits() -> None:
    scoring = Scoring(kind="chosen", top_k=2, by_probability=True)
    logits, bias = logits_of(21, 8), torch.linspace(-0.3, 0.3, 8)
    check(logits, scoring, bias=bias, padding=torch.arange(21) % 4 == 1)
    found = top_k(logits, scoring, bias_E=bias)
    slow = routes(logits, top_k=2, bias=bias.tolist(), by_probability=True)
    assert found.ids_TK.tolist() == [list(choices) for choices in slow]
    assert slow != routes(logits, top_k=2, bias=bias.tolist())


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_and_one(kind: str, num_tokens: int) -> None:
    check(logits_of(num_tokens, 5), Scoring(kind=kind, top_k=2))
    check(logits_of(num_tokens, 5), Scoring(kind=kind, top_k=5), padding=torch.ones(num_tokens).bool())
    check(logits_of(num_tokens, 1), Scoring(kind=kind, top_k=1))


def test_many_experts_and_several_tiles_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    check(logits_of(3, 1000), Scoring(kind="chosen", top_k=3))
    monkeypatch.setattr(module, "_TILE", 32)
    monkeypatch.setattr(module, "_MOST_PROGRAMS", 3)
    check(logits_of(21, 8), Scoring(kind="chosen", top_k=3), padding=torch.arange(21) > 15)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_and_weights_are_those_of_a_slow_router(kind: str) -> None:
    logits, bias = logits_of(12, 7), torch.linspace(0.3, -0.3, 7)
    found = top_k(logits, Scoring(kind=kind, top_k=3, scale=1.5), bias_E=bias)
    function = "sigmoid" if kind == "sigmoid" else "softmax"
    slow = routes(logits, top_k=3, function=function, pre=kind == "softmax", scale=1.5, bias=bias.tolist())
    assert found.ids_TK.tolist() == [list(choices) for choices in slow]
    expected = torch.tensor([list(choices.values()) for choices in slow])
    close(found.weights_TK, expected, torch.float32)
    assert found.histogram_34E is not None
    first, second, later = found.histogram_34E
    for counts, ids in (
        (first, found.ids_TK[:, 0]),
        (second, found.ids_TK[:, 1]),
        (later, found.ids_TK[:, 2]),
    ):
        assert counts[0].tolist() == torch.bincount(ids, minlength=7).tolist()
        assert not counts[1:].any()


def test_of_equal_scores_the_lower_id_wins() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -0.0, 1.0], [0.0] * 5, [-1.0, -0.0, 0.0, -2.0, -1.0]])
    found = top_k(logits, Scoring(kind="chosen", top_k=4))
    assert found.ids_TK.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [1, 2, 0, 4]]


def test_a_choice_is_of_different_experts_whatever_the_logits() -> None:
    """What is not a number is largest, as in torch; an expert that is shut out may be chosen, but once."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan] * 4, [-inf] * 4, [inf, -inf, nan, 0.0], [-inf, 2.0, -inf, -inf]])
    found = top_k(logits, Scoring(kind="chosen", top_k=3))
    assert found.ids_TK.tolist() == [[0, 1, 2], [0, 1, 2], [2, 0, 3], [1, 0, 2]]
    assert torch.equal(found.ids_TK, top_k_slowly(logits, Scoring(kind="chosen", top_k=3)).ids_TK)


def test_logits_that_are_not_contiguous() -> None:
    logits = logits_of(16, 20)[::2, ::2]
    expected = top_k(logits.contiguous(), Scoring(kind="sigmoid", top_k=2))
    for one, other in zip(top_k(logits, Scoring(kind="sigmoid", top_k=2)), expected, strict=True):
        assert one is not None and other is not None
        assert torch.equal(one, other)
