"""MXFP4: values by hand and beside transformers' own, in every scale that bfloat16 holds; layouts of experts.

Run with ``pytest tests/unit/convert/test_convert_mxfp4.py``.
"""

import math

import pytest
import torch

from fairseq_moe.convert.hf.layout import OUR_WAY, Layout, put, stored_shape, take
from fairseq_moe.convert.hf.mxfp4 import VALUES, decoded, unpacked_names
from tests.helpers.hf import import_transformers

ALL_CODES = torch.tensor([(2 * i + 1) << 4 | 2 * i for i in range(8)] * 2, dtype=torch.uint8)


def e2m1(code: int) -> float:
    """The meaning of four bits by the OCP's definition: sign, exponent (bias 1, 0 is subnormal), mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def test_the_table_is_that_of_the_format() -> None:
    assert list(VALUES) == [e2m1(code) for code in range(16)]
    assert math.copysign(1.0, VALUES[8]) == -1.0


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 252])
def test_every_code_and_scale_is_exact(scale: int) -> None:
    found = decoded(ALL_CODES[None], torch.tensor([scale], dtype=torch.uint8))
    assert found.dtype == torch.bfloat16
    assert found.double().tolist() == [value * 2.0 ** (scale - 127) for value in VALUES] * 2
    assert math.copysign(1.0, float(found[8])) == -1.0


@pytest.mark.parametrize(("scale", "largest"), [(253, 3.0), (254, 1.5)])
def test_what_no_float_holds_is_infinite(scale: int, largest: float) -> None:
    found = decoded(ALL_CODES[None], torch.tensor([scale], dtype=torch.uint8))[:16]
    expected = [
        value * 2.0 ** (scale - 127) if abs(value) <= largest else math.copysign(math.inf, value)
        for value in VALUES
    ]
    assert found.double().tolist() == expected


def test_the_scale_that_is_no_number_gives_none() -> None:
    assert decoded(ALL_CODES[None], torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_blocks_mean_what_transformers_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import_transformers()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # Pieces that end within a row, and a last one that is not full.
    monkeypatch.setattr("fairseq_moe.convert.hf.mxfp4._GROUPS_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 253, (3, 10, 2), dtype=torch.uint8, generator=generator)
    for dtype in (torch.bfloat16, torch.float32):
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        found = decoded(blocks, scales, dtype=dtype).transpose(1, 2)
        assert found.dtype == dtype
        assert torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8))


def test_blocks_and_scales_are_one_weight() -> None:
    names = ["a_blocks", "b", "a_scales", "c_blocks", "d_scales"]
    assert list(unpacked_names(names)) == ["a", "b", "c_blocks", "d_scales"]


GATE, UP = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[10, 20, 30], [40, 50, 60]])


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        (OUR_WAY, [[1, 2, 3], [4, 5, 6], [10, 20, 30], [40, 50, 60]]),
        (Layout(interleaved=True), [[1, 2, 3], [10, 20, 30], [4, 5, 6], [40, 50, 60]]),
        (Layout(transposed=True), [[1, 4, 10, 40], [2, 5, 20, 50], [3, 6, 30, 60]]),
        (Layout(transposed=True, interleaved=True), [[1, 10, 4, 40], [2, 20, 5, 50], [3, 30, 6, 60]]),
    ],
)
def test_layouts_by_hand(layout: Layout, stored: list[list[int]]) -> None:
    ours = torch.cat([GATE, UP])
    assert take(torch.tensor(stored), layout).tolist() == ours.tolist()
    assert put(ours, layout).tolist() == stored
    assert stored_shape((7, 4, 3), layout) == (7, *torch.tensor(stored).shape)


def test_biases_are_interleaved_alike() -> None:
    layout = Layout(interleaved=True)
    assert take(torch.tensor([1, 10, 4, 40]), layout).tolist() == [1, 4, 10, 40]
    assert put(torch.tensor([1, 4, 10, 40]), layout).tolist() == [1, 10, 4, 40]
    assert stored_shape((7, 4), layout) == (7, 4)
