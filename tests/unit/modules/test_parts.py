"""Which rows of a dimension each part has."""

import pytest
import torch

from fairseq_moe.modules.parts import part_slices, take_part


def rows(size: int, **part: int) -> list[int]:
    return [row for each in part_slices(size, **part) for row in range(each.start, each.stop)]


def test_parts_are_neighbouring_rows() -> None:
    assert rows(6, index=0, count=3) == [0, 1]
    assert rows(6, index=2, count=3) == [4, 5]


def test_a_part_of_a_gated_matrix_has_rows_of_the_gate_and_of_what_it_opens() -> None:
    # gate 0 1 2 3, up 4 5 6 7
    assert rows(8, index=0, count=2, blocks=2) == [0, 1, 4, 5]
    assert rows(8, index=1, count=2, blocks=2) == [2, 3, 6, 7]


@pytest.mark.parametrize(("count", "blocks"), [(1, 1), (1, 2), (2, 1), (3, 2), (4, 3)])
def test_every_row_is_in_one_part(count: int, blocks: int) -> None:
    found = [row for index in range(count) for row in rows(24, index=index, count=count, blocks=blocks)]
    assert sorted(found) == list(range(24))


def test_parts_that_cannot_be_equal_differ_by_one_row() -> None:
    # 11 rows: ends at 11 * 1 // 4 = 2, 5, 8, 11
    assert [rows(11, index=index, count=4) for index in range(4)] == [
        [0, 1],
        [2, 3, 4],
        [5, 6, 7],
        [8, 9, 10],
    ]
    assert rows(2, index=0, count=3) == []  # fewer rows than parts


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_is_a_copy_of_its_rows(dim: int) -> None:
    whole = torch.arange(88).view(11, 8) if dim == 0 else torch.arange(88).view(8, 11)
    part = take_part(whole, dim, index=1, count=4)
    assert torch.equal(part, whole.narrow(dim, 2, 3))
    part.zero_()
    assert int(whole.sum()) == sum(range(88))
    other = whole.shape[1 - dim]
    gated = take_part(whole, 1 - dim, index=1, count=2, blocks=2)
    assert other == 8 and torch.equal(gated, whole.index_select(1 - dim, torch.tensor([2, 3, 6, 7])))
