"""Tensors of more than 2^31 values: offsets do not overflow. Only the last rows are compared, and beside a twin's."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused.adam import AdamStep, adam_step_, adam_step_slowly_
from fairseq_moe.fused.add_bias import add_bias_, add_bias_slowly_
from fairseq_moe.fused.add_rows import add_rows, add_rows_slowly, spread_rows, spread_rows_slowly
from fairseq_moe.fused.grouped_product import grouped_grad_rows, grouped_outputs, row_tiles
from fairseq_moe.fused.nll import nll, nll_backward_, nll_backward_slowly, nll_slowly
from fairseq_moe.fused.quantize_rows import quantize_rows, quantize_rows_slowly
from fairseq_moe.fused.weighted_activation import (
    ActivationKind,
    weighted_activation,
    weighted_activation_backward,
    weighted_activation_backward_slowly,
    weighted_activation_slowly,
)

LAST = 64
NEEDED_BYTES = 40 * 2**30


@pytest.fixture
def room(device: torch.device) -> int:
    """How many values to take: on CPU few, only to show that the tests run."""
    if device.type == "cpu":
        return 16_000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < NEEDED_BYTES:
        pytest.skip("needs 40 GiB of the GPU's memory")
    return 2**31 + 200_000


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.any()
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_rows_of_tokens(device: torch.device, room: int) -> None:
    width = 2048 if device.type == "cuda" else 20
    rows = normal(room // width, width, device=device)
    row_of = torch.arange(len(rows) - LAST, len(rows), device=device).view(-1, 4)
    close(add_rows(rows, row_of), add_rows_slowly(rows, row_of))
    grad, weights = normal(LAST, width, device=device), normal(len(rows), device=device)
    token_of = torch.arange(len(rows), device=device) % LAST
    found = spread_rows(grad, token_of, rows, weights)
    expected = spread_rows_slowly(grad, token_of[-LAST:], rows[-LAST:], weights[-LAST:])
    close(found[0][-LAST:], expected[0])
    torch.testing.assert_close(found[1][-LAST:], expected[1], atol=0.5, rtol=2e-2)
    del found
    bias, expert_of = normal(4, width, device=device), torch.arange(len(rows), device=device) % 4
    before = rows[-LAST:].clone()
    add_bias_(rows, bias, expert_of)
    close(rows[-LAST:], add_bias_slowly_(before, bias, expert_of[-LAST:]))


def test_activations(device: torch.device, room: int) -> None:
    kind, width = ActivationKind.SWIGLU, 1024 if device.type == "cuda" else 10
    hidden = normal(room // width, 2 * width, device=device)
    weights = normal(len(hidden), device=device)
    last, last_weights = hidden[-LAST:], weights[-LAST:]
    active = weighted_activation(kind, hidden, weights_R=weights)
    close(active[-LAST:], weighted_activation_slowly(kind, last, weights_R=last_weights))
    found = weighted_activation_backward(kind, active, hidden, weights_R=weights)
    expected = weighted_activation_backward_slowly(kind, active[-LAST:], last, weights_R=last_weights)
    close(found[1][-LAST:], expected[1])


def test_quantised_rows(device: torch.device, room: int) -> None:
    width = 2048 if device.type == "cuda" else 20
    x = normal(room // width, width, device=device)
    codes, scales = quantize_rows(x)
    expected, expected_scales = quantize_rows_slowly(x[-LAST:])
    torch.testing.assert_close(scales[-LAST:], expected_scales)
    assert (codes[-LAST:].view(torch.uint8) == expected.view(torch.uint8)).double().mean() > 0.999


def test_likelihoods(device: torch.device, room: int) -> None:
    if device.type == "cpu":
        pytest.skip("these take no twin by themselves")
    words = 51_200
    logits = normal(room // words, words, device=device)
    target = torch.randint(2, words, (len(logits),), device=device)
    last, last_target, one = logits[-LAST:].clone(), target[-LAST:], torch.ones((), device=device)
    expected, expected_sum = nll_slowly(last, last_target, ignore_index=1)
    loss, log_sum = nll(logits, target, ignore_index=1)
    torch.testing.assert_close(loss[-LAST:], expected, atol=1e-4, rtol=1e-5)
    nll_backward_(logits, target, log_sum, one, ignore_index=1)
    close(logits[-LAST:], nll_backward_slowly(last, last_target, expected_sum, one, ignore_index=1))


def test_grouped_products(device: torch.device, room: int) -> None:
    width, hidden = 64, 32
    x, weight = normal(room // width, width, device=device), normal(3, hidden, width, device=device)
    shares = torch.tensor([0, len(x) - LAST, LAST], device=device)
    tiles = row_tiles(shares, dtype=x.dtype)
    y = grouped_outputs(x, weight, tiles)
    torch.testing.assert_close(y[-LAST:], x[-LAST:] @ weight[2].t(), atol=0.3, rtol=2e-2)
    back = grouped_grad_rows(y, weight, tiles)
    torch.testing.assert_close(back[-LAST:], y[-LAST:] @ weight[2], atol=3.0, rtol=2e-2)


def test_adam(device: torch.device, room: int) -> None:
    step = AdamStep(lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, step=3)
    tensors = [normal(room, device=device) for _ in range(2)]
    tensors += [torch.zeros(room, device=device) for _ in range(2)]
    expected = [tensor[-LAST:].clone() for tensor in tensors]
    adam_step_(tensors[0], tensors[1], tensors[2], tensors[3], step)
    adam_step_slowly_(expected[0], expected[1], expected[2], expected[3], step)
    for a, b in zip(tensors, expected, strict=True):
        close(a[-LAST:], b)
