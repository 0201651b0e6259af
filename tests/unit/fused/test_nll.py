"""Likelihoods: kernel, twin and torch's own in float64 agree, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.criterions.nll import summed_nll
from fairseq_moe.fused import nll as module
from fairseq_moe.fused.nll import nll, nll_backward_, nll_backward_slowly, nll_slowly

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
LEFT_OUT = (1, -100)  # within the vocabulary, as padding is, and outside


def case(tokens: int, vocabulary: int, dtype: torch.dtype, ignore_index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(tokens, vocabulary, generator=generator) * 4).to(dtype)
    target = torch.randint(2, vocabulary, (tokens,), generator=generator)
    target[1::3] = ignore_index
    return logits, target


def by_torch(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    loss = F.nll_loss(F.log_softmax(leaf, -1), target, ignore_index=ignore_index, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum() * 0.5, leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("ignore_index", LEFT_OUT)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(7, 1003), (1, 5), (0, 8), (3, 64)])
def test_value_and_gradient(
    tokens: int, vocabulary: int, dtype: torch.dtype, ignore_index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_V", 256)  # several blocks of a row
    logits, target = case(tokens, vocabulary, dtype, ignore_index)
    expected, expected_grad = by_torch(logits, target, ignore_index)
    for forward, backward in ((nll, nll_backward_), (nll_slowly, nll_backward_slowly)):
        given = logits.clone()
        loss, log_sum = forward(given, target, ignore_index=ignore_index)
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        grad = backward(given, target, log_sum, torch.tensor(0.5), ignore_index=ignore_index)
        assert grad.dtype is dtype and (grad is given) is (backward is nll_backward_)
        torch.testing.assert_close(grad.double(), expected_grad, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_words_that_cannot_be() -> None:
    """Logits of -inf have no probability and no gradient; a token that is left out has no gradient whatever it has."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")], [float("nan")] * 4])
    target = torch.tensor([2, -100])
    loss, log_sum = nll(logits, target, ignore_index=-100)
    assert float(loss[0]) == pytest.approx(-float(F.log_softmax(torch.tensor([0.0, 1.0]), 0)[1]))
    assert float(loss[1]) == 0
    grad = nll_backward_(logits, target, log_sum, torch.tensor(1.0), ignore_index=-100)
    assert grad[0, 1] == grad[0, 3] == 0 and grad.isfinite().all()


def test_a_target_that_is_no_word_makes_the_loss_nan_instead_of_another_rows() -> None:
    loss, _ = nll(torch.randn(3, 5), torch.tensor([5, 4, -2]), ignore_index=1)
    assert loss.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_criterion_takes_it_and_writes_over_the_logits(dtype: torch.dtype) -> None:
    logits, target = case(7, 53, dtype, 1)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0  # as a projection would make them
    loss = summed_nll(hidden, target, ignore_index=1)
    assert loss.dtype is torch.float32
    expected, expected_grad = by_torch(logits, target, 1)
    torch.testing.assert_close(loss.detach().double(), expected.sum(), atol=1e-4, rtol=1e-5)
    (loss * 0.5).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(
        leaf.grad.double(), expected_grad, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    with pytest.raises(RuntimeError):
        loss.backward()
