"""The balance losses by hand, and where their gradients flow."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.routing.contract import count_assignments
from fairseq_moe.modules.routing.losses import balance_loss, sequence_balancing_loss


def counts_of(first: list[int], requested: list[bool] | None = None, *, num_experts: int = 2) -> Tensor:
    ids = torch.tensor(first, dtype=torch.int64).view(-1, 1)
    mask = (
        torch.ones_like(ids, dtype=torch.bool) if requested is None else torch.tensor(requested).view(-1, 1)
    )
    return count_assignments(ids, mask, mask, num_experts=num_experts).first_choices()


def test_by_hand() -> None:
    gates = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
    # means 0.6, 0.4; first choices 0 0 1 0: shares 3/4, 1/4; 2 * (0.6 * 0.75 + 0.4 * 0.25) = 1.1
    assert float(balance_loss(gates, counts_of([0, 0, 1, 0]))) == pytest.approx(1.1)


def test_padding_counts_in_the_denominators_and_the_mean_but_chooses_nothing() -> None:
    gates = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
    # token 3 is padding: shares 2/4, 1/4; 2 * (0.6 * 0.5 + 0.4 * 0.25) = 0.8
    loss = balance_loss(gates, counts_of([0, 0, 1, 0], [True, True, True, False]))
    assert float(loss) == pytest.approx(0.8)


@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_uniform_is_one(num_experts: int) -> None:
    gates = torch.full((4 * num_experts, num_experts), 1 / num_experts)
    loss = balance_loss(gates, counts_of(list(range(num_experts)) * 4, num_experts=num_experts))
    assert float(loss) == pytest.approx(1.0)


def test_gradient_is_the_share() -> None:
    gates = torch.tensor([[0.7, 0.3], [0.6, 0.4]], requires_grad=True)
    balance_loss(gates, counts_of([0, 0])).backward()
    # E * share_e / T = 2 * (1, 0) / 2
    assert gates.grad is not None
    assert gates.grad.tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    # 100,000 tokens: a half-precision sum of gates would stop growing long before
    gates = torch.full((100_000, 2), 0.5, dtype=dtype)
    loss = balance_loss(gates, counts_of([0, 1] * 50_000))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1.0)


def test_float64_stays_float64() -> None:
    assert balance_loss(torch.full((2, 2), 0.5).double(), counts_of([0, 1])).dtype == torch.float64


def test_no_tokens_and_all_padding_are_zero() -> None:
    assert float(balance_loss(torch.empty(0, 4), counts_of([], num_experts=4))) == 0.0
    assert float(balance_loss(torch.full((2, 2), 0.5), counts_of([0, 1], [False, False]))) == 0.0


def test_sequences_weigh_as_much_as_they_have_tokens() -> None:
    scores = torch.tensor(
        [
            # three tokens: choices 0 0 1, shares 2/3, 1/3; means 1.75/3, 1.25/3;
            # 2 * (2/3 * 1.75/3 + 1/3 * 1.25/3) = 19/18
            *([0.75, 0.25], [0.75, 0.25], [0.25, 0.75]),
            # one token and two of padding: shares 1, 0; means 0.875, 0.125; 2 * 0.875 = 7/4
            *([0.875, 0.125], [0.0, 1.0], [0.1, 0.9]),
            # padding alone
            *([0.0, 1.0], [0.0, 1.0], [0.0, 1.0]),
        ]
    )
    padding = torch.tensor([False, False, False, False, True, True, True, True, True])
    # (3 * 19/18 + 1 * 7/4 + 0) / 4 = 59/48; the plain mean of the first two would be 101/72, of all three 101/108
    best = scores.argmax(-1, keepdim=True)
    loss = sequence_balancing_loss(scores, best, num_sequences=3, padding_T=padding)
    assert float(loss) == pytest.approx(59 / 48)
