"""Sums of a token's rows: kernel and twin are equal, in value and every gradient's formula."""

import pytest
import torch

from fairseq_moe.fused.add_rows import add_rows, add_rows_slowly, spread_rows, spread_rows_slowly

T, K = 7, 3
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def index_of(num_rows: int) -> torch.Tensor:
    """Each row once, and choices without a row."""
    where = torch.randperm(T * K, generator=torch.Generator().manual_seed(1))[:num_rows]
    return torch.full((T * K,), -1).scatter(0, where, torch.arange(num_rows)).view(T, K)


def close(found: torch.Tensor, expected: torch.Tensor, *, factor: float = 1) -> None:
    assert found.dtype is expected.dtype
    tolerance = factor * TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(17, 70), (1, 5), (0, 8), (21, 1100)], ids=str)
def test_sums(shape: tuple[int, int], dtype: torch.dtype, weighted: bool) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = torch.rand(shape[0]).to(dtype) if weighted else None
    index = index_of(shape[0])
    close(add_rows(rows, index, weights_R=weights), add_rows_slowly(rows, index, weights_R=weights))
    strange = rows.t().contiguous().t()
    close(add_rows(strange, index, weights_R=weights), add_rows_slowly(rows, index, weights_R=weights))


def test_rows_that_are_nobodys_reach_no_sum() -> None:
    rows = torch.randn(20, 6)
    rows[17:] = float("nan")
    assert add_rows(rows, index_of(17)).isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(17, 70), (1, 5), (0, 8), (3, 1100)], ids=str)
def test_gradients_of_the_weighted_sum_are_those_of_autograd(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    index = index_of(shape[0])
    token_R = torch.empty(shape[0], dtype=torch.int64)
    token_R[index[index >= 0]] = (index >= 0).nonzero()[:, 0]
    rows, weights = torch.randn(shape).to(dtype), torch.rand(shape[0]).to(dtype)
    grad = torch.randn(T, shape[1]).to(dtype)
    found, slow = spread_rows(grad, token_R, rows, weights), spread_rows_slowly(grad, token_R, rows, weights)
    close(found[0], slow[0])
    close(
        found[1], slow[1], factor=10
    )  # up to 1,100 terms, added in an order that each processor has of its own
    if shape[0] == 0:
        return
    leaves = [tensor.double().requires_grad_() for tensor in (rows, weights)]
    by_autograd = torch.autograd.grad(
        add_rows_slowly(leaves[0], index, weights_R=leaves[1]), leaves, grad.double(), materialize_grads=True
    )
    for a, c in zip(found, by_autograd, strict=True):
        tolerance = 10 * TOLERANCE[dtype]
        torch.testing.assert_close(a.double(), c, atol=tolerance, rtol=tolerance)


def test_weights_and_tokens_with_strides() -> None:
    rows, weights, grad = torch.randn(9, 5), torch.randn(9), torch.randn(T, 5)
    index, token_R = index_of(9), torch.arange(9) % T
    strided = [torch.stack([values, values + 1], dim=1)[:, 0] for values in (weights, token_R)]
    close(add_rows(rows, index, weights_R=strided[0]), add_rows(rows, index, weights_R=weights))
    found = spread_rows(grad, strided[1], rows, strided[0])
    for a, b in zip(found, spread_rows(grad, token_R, rows, weights), strict=True):
        close(a, b)
