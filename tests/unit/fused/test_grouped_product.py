"""Grouped products in three directions against products expert by expert in float64."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused import grouped_product, launch
from fairseq_moe.fused.grouped_product import (
    RowTiles,
    grouped_grad_rows,
    grouped_grad_weight,
    grouped_outputs,
    row_tiles,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
COUNTS = {
    "some": (3, 17, 5, 2),
    "row": (0, 1),
    "single": (18,),
    "zero": (4, 0, 20, 0),
    "one": (0, 0, 33, 0),
    "tiles": (16, 32, 16, 1),
    "none": (0, 0, 0, 0),
}
NOBODYS = 3


def tiles_of(counts: tuple[int, ...], dtype: torch.dtype) -> RowTiles:
    return row_tiles(torch.tensor(counts), dtype=dtype)


def parts(values: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    return list(values[: sum(counts)].double().split(counts))


@pytest.fixture(params=["kernels", "twins"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "twins":
        monkeypatch.setattr(launch, "DEVICES", {"cuda"})


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("counts", "width", "height", "strange"),
    [
        *((counts, 5, 17, False) for counts in COUNTS.values()),
        (COUNTS["some"], 35, 24, False),
        (COUNTS["zero"], 17, 5, True),
    ],
)
def test_three_directions(
    counts: tuple[int, ...], width: int, height: int, dtype: torch.dtype, strange: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = (torch.randn(shape, generator=generator) * 0.5).to(dtype)
        return values.transpose(-1, -2).contiguous().transpose(-1, -2) if strange else values

    num_rows = sum(counts)
    x, grad, weight = (
        random(num_rows + NOBODYS, width),
        random(num_rows + NOBODYS, height),
        random(len(counts), height, width),
    )
    x[num_rows:] = grad[num_rows:] = float("nan")  # rows that are nobody's
    tiles = tiles_of(counts, dtype)
    tolerance = TOLERANCE[dtype]
    wide = weight.double()
    for found, expected in (
        (
            grouped_outputs(x, weight, tiles)[:num_rows],
            torch.cat([part @ w.t() for part, w in zip(parts(x, counts), wide, strict=True)]),
        ),
        (
            grouped_grad_rows(grad, weight, tiles)[:num_rows],
            torch.cat([part @ w for part, w in zip(parts(grad, counts), wide, strict=True)]),
        ),
        (
            grouped_grad_weight(grad, x, tiles),
            torch.stack([g.t() @ r for g, r in zip(parts(grad, counts), parts(x, counts), strict=True)]),
        ),
    ):
        assert found.dtype is dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_every_tile_of_many_experts_finds_its_own() -> None:
    torch.manual_seed(0)
    counts = tuple(int(count) for count in torch.randint(0, 3, (70,)))
    x, weight = torch.randn(sum(counts), 4), torch.randn(len(counts), 3, 4)
    found = grouped_outputs(x, weight, tiles_of(counts, torch.float32))
    expected = torch.cat([part @ w.t() for part, w in zip(x.split(counts), weight, strict=True)])
    torch.testing.assert_close(found, expected)


def test_a_gradient_that_is_one_row_expanded() -> None:
    counts = (3, 0, 18)
    x, weight = torch.randn(21, 6), torch.randn(3, 4, 6)
    grad, tiles = torch.randn(4).expand(21, 4), tiles_of(counts, torch.float32)
    for given in (x, x[:, :1].expand(21, 6)):
        expected = torch.stack(
            [g.t() @ r for g, r in zip(grad.split(counts), given.split(counts), strict=True)]
        )
        torch.testing.assert_close(grouped_grad_weight(grad, given, tiles), expected)
    expected = torch.cat([part @ w for part, w in zip(grad.split(counts), weight, strict=True)])
    torch.testing.assert_close(grouped_grad_rows(grad, weight, tiles), expected)


def test_many_tiles_of_the_gradient_each_in_its_place() -> None:
    # Ten tiles of rows by three of columns: a whole group of tiles, and a rest.
    x, grad = torch.randn(9, 35), torch.randn(9, 147)
    found = grouped_grad_weight(grad, x, tiles_of((5, 4), torch.float32))
    expected = torch.stack([g.t() @ r for g, r in zip(grad.split((5, 4)), x.split((5, 4)), strict=True)])
    torch.testing.assert_close(found, expected)


def test_no_rows_at_all() -> None:
    x, grad, weight = torch.empty(0, 5), torch.empty(0, 4), torch.randn(2, 4, 5)
    tiles = tiles_of((0, 0), torch.float32)
    assert grouped_outputs(x, weight, tiles).shape == (0, 4)
    assert grouped_grad_rows(grad, weight, tiles).shape == (0, 5)
    assert torch.equal(grouped_grad_weight(grad, x, tiles), torch.zeros(2, 4, 5))


@pytest.mark.parametrize(
    ("setting", "value", "precision"),
    [
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "ieee"),
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "ieee"),
    ],
)
def test_tf32_is_taken_where_torch_may_take_it(setting: str, value: str | bool, precision: str) -> None:
    # To ask by the older of torch's two settings raises an error once TF32 was allowed by the newer one.
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        setattr(matmul, setting, value)
        assert grouped_product._options(torch.empty(1), grouped_product._SMALL)["PRECISION"] == precision
    finally:
        if setting == "allow_tf32":
            matmul.allow_tf32 = False
        matmul.fp32_precision = before
    assert matmul.fp32_precision == before and not matmul.allow_tf32
