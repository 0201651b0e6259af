"""Biases of rows: kernel and twin are equal, and rows that are nobody's stay as they are."""

import pytest
import torch

from fairseq_moe.fused.add_bias import add_bias_, add_bias_slowly_

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
L = 3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(9, 70), (1, 5), (0, 8), (3, 1100)], ids=str)
def test_kernel_against_twin_and_float64(shape: tuple[int, int], dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(L, shape[1], generator=generator).to(dtype)
    expert = torch.arange(shape[0]) * L // max(shape[0], 1)
    weights = torch.rand(shape[0], generator=generator).to(dtype) if weighted else None
    exact = rows.double() + bias.double()[expert] * (1 if weights is None else weights.double().unsqueeze(1))
    for function in (add_bias_, add_bias_slowly_):
        for values in (rows.clone(), rows.t().clone(memory_format=torch.contiguous_format).t()):
            found = function(values, bias, expert, weights_R=weights)
            assert found is values
            torch.testing.assert_close(found.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rows_that_are_nobodys_are_left_alone() -> None:
    rows = torch.zeros(5, 6)
    found = add_bias_(rows, torch.ones(L, 6), torch.tensor([0, 1, 2, 2, 2]), num_rows=torch.tensor(3))
    assert found[:, 0].tolist() == [1, 1, 1, 0, 0]


def test_weights_and_experts_with_strides() -> None:
    rows, bias = torch.randn(6, 5), torch.randn(L, 5)
    weights, expert = torch.randn(6), torch.tensor([0, 0, 1, 1, 2, 2])
    strided = [torch.stack([values, values * 0], dim=1)[:, 0] for values in (weights, expert)]
    found = add_bias_(rows.clone(), bias, strided[1], weights_R=strided[0])
    torch.testing.assert_close(found, add_bias_(rows.clone(), bias, expert, weights_R=weights))
