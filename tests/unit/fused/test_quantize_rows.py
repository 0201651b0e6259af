"""Rows and columns in e4m3: kernel and twin are equal to the bit, and off by no more than the format's bound."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused.quantize_rows import quantize_columns, quantize_rows, quantize_rows_slowly

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values of many magnitudes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 3, shape, generator=generator)
    return values.to(dtype)


def quantised(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same by both kernels and the twin."""
    values, scales = quantize_columns(x.t().unsqueeze(0).contiguous())
    return [quantize_rows(x), quantize_rows_slowly(x), (values[0], scales[0])]


def assert_within_bound(values: Tensor, scales: Tensor, x: Tensor) -> None:
    """Off by a sixteenth of itself, or half of the smallest step, 2^-9, times the scale."""
    exact = x.double()
    off = (values.double() * scales.double().unsqueeze(1) - exact).abs()
    assert (off <= torch.maximum(exact.abs() / 16, scales.double().unsqueeze(1) * 2.0**-10) * 1.0001).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 70), (1, 5), (0, 8), (3, 1100), (4, 0)], ids=str)
def test_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    for given in (x, x.t().clone(memory_format=torch.contiguous_format).t()):
        values, scales = quantize_rows(given)
        expected, expected_scales = quantize_rows_slowly(x)
        assert values.dtype is torch.float8_e4m3fn and values.shape == x.shape
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales, expected_scales)
        assert_within_bound(values, scales, x)


def test_ties_zeros_and_the_largest() -> None:
    """With scale 1, so that each value is rounded as it is."""
    x = torch.tensor([[448.0, -448.0, 17.0, 19.0, 0.0, -0.0625, 2.0**-10, 3 * 2.0**-10, 2.0**-6 * 0.99]])
    values, scales = quantize_rows(x)
    assert scales.tolist() == [1.0]
    expected = [448.0, -448.0, 16.0, 20.0, 0.0, -0.0625, 0.0, 2.0**-8, 2.0**-6]
    assert values.float().tolist() == [expected]
    zeros, ones = quantize_rows(torch.zeros(2, 5))
    assert not zeros.float().any() and ones.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-36, 3e38])
def test_rows_of_any_size_stay_finite(largest: float) -> None:
    """A scale of a row that is hardly there would be zero, and zeros divided by it not finite."""
    x = torch.tensor([[largest, 0.0, -largest, largest / 4]])
    for values, scales in quantised(x):
        assert values.float().isfinite().all() and (scales > 0).all()
        assert_within_bound(values, scales, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("culprit", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(culprit: float, dtype: torch.dtype) -> None:
    """Not by saturation: the guard of a training step must see it."""
    x = random(3, 5, dtype=dtype)
    x[1, 2] = culprit
    for values, scales in quantised(x):
        found = values.float() * scales.unsqueeze(1)
        assert found.isfinite().all(1).tolist() == [True, False, True]


def test_rows_that_are_nobodys_are_left_alone() -> None:
    x = random(5, 6, dtype=torch.float32)
    x[3:] = float("nan")
    values, scales = quantize_rows(x, num_rows=torch.tensor(3))
    assert values[:3].float().isfinite().all() and scales[:3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 33), (1, 5, 3), (3, 1, 130)], ids=str)
def test_columns_are_the_rows_of_the_transpose(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = random(*shape, dtype=dtype)
    values, scales = quantize_columns(weight)
    assert values.shape == (shape[0], shape[2], shape[1]) and values.is_contiguous()
    for matrix, found, scale in zip(weight, values, scales, strict=True):
        expected, expected_scale = quantize_rows_slowly(matrix.t())
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
