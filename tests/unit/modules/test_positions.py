"""Positions of a sequence are shared out among ranks: each once, in balanced halves, absent ones last.

Run with ``pytest tests/unit/modules/test_positions.py``.
"""

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.shards import LocalShards, SequencePart, ShardedOutput

GRIDS = [(context, tensor) for context in (1, 2, 4) for tensor in (1, 2)]
LENGTHS = (13, 9, 5, 1)
ABSENT = -1
_ = ABSENT  # in the drawings

# By hand, of (length, context, tensor): what each rank has for its own, ranks by context, then by tensor.
DRAWN = {
    (5, 1, 1): [[0, 1, 2, 3, 4]],
    (5, 1, 2): [[0, 1, 2], [3, 4, _]],
    # Chunks of 2, 4 of them: rank 0 has the first and the last, which is absent.
    (5, 2, 1): [[0, 1, _, _], [2, 3, 4, _]],
    (5, 2, 2): [[0, 1], [_, _], [2, 3], [4, _]],
    (5, 4, 1): [[0, _], [1, _], [2, _], [3, 4]],
    (5, 4, 2): [[0, 1], [_, _], [2, 3], [_, _], [4, _], [_, _], [_, _], [_, _]],
    (13, 1, 2): [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, _]],
    # 16 positions in chunks of 4.
    (13, 2, 1): [[0, 1, 2, 3, 12, _, _, _], [4, 5, 6, 7, 8, 9, 10, 11]],
    (13, 2, 2): [[0, 1, 2, 3], [12, _, _, _], [4, 5, 6, 7], [8, 9, 10, 11]],
    (13, 4, 1): [[0, 1, _, _], [2, 3, 12, _], [4, 5, 10, 11], [6, 7, 8, 9]],
    (13, 4, 2): [[0, 1], [_, _], [2, 3], [12, _], [4, 5], [10, 11], [6, 7], [8, 9]],
    # 12 positions in chunks of 3 over tensor 2: each context rank has 6.
    (9, 2, 1): [[0, 1, 2, _, _, _], [3, 4, 5, 6, 7, 8]],
    (9, 2, 2): [[0, 1, 2, 3], [_, _, _, _], [4, 5, 6, 7], [8, _, _, _]],
    (1, 1, 2): [[0], [_]],
    (1, 2, 2): [[0, _], [_, _], [_, _], [_, _]],
    (1, 4, 1): [[0, _], [_, _], [_, _], [_, _]],
}  # fmt: skip


def parts_of(length: int, context: int, tensor: int) -> list[SequencePart]:
    return [
        SequencePart(
            length=length, context=context, tensor=tensor, context_index=context_index, tensor_index=index
        )
        for context_index in range(context)
        for index in range(tensor)
    ]


def numbered(length: int) -> Tensor:
    """Two sequences whose positions say where they are, with a last dimension of 3."""
    positions_S = torch.arange(length)
    return torch.stack([positions_S, 100 + positions_S]).unsqueeze(2).repeat(1, 1, 3)


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_as_drawn(case: tuple[int, int, int]) -> None:
    parts = parts_of(*case)
    own = [part.own(torch.arange(case[0]), dim=0, filler=ABSENT).tolist() for part in parts]
    assert own == DRAWN[case]
    assert [part.num_own for part in parts] == [len(positions) for positions in own]
    assert [part.num_present for part in parts] == [len(positions) - positions.count(_) for positions in own]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_position_once_and_absent_ones_last(grid: tuple[int, int], length: int) -> None:
    x_BSD = numbered(length)
    found = []
    for part in parts_of(length, *grid):
        own_BSD = part.own(x_BSD, dim=1, filler=ABSENT)
        assert own_BSD.shape == (2, part.num_own, 3)
        present, absent = own_BSD.split([part.num_present, part.num_own - part.num_present], 1)
        assert bool((absent == ABSENT).all()) and bool((present != ABSENT).all())
        assert present[0, :, 0].tolist() == sorted(present[0, :, 0].tolist())
        assert torch.equal(present[1], present[0] + 100)
        found += present[0, :, 0].tolist()
        # Along another dimension, the same.
        assert torch.equal(part.own(x_BSD.transpose(0, 1), dim=-3, filler=ABSENT), own_BSD.transpose(0, 1))
    assert sorted(found) == list(range(length))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_own_positions_are_a_part_of_those_of_the_context_rank(grid: tuple[int, int], length: int) -> None:
    x_BSD = numbered(length)
    parts = parts_of(length, *grid)
    _, tensor = grid
    for first in range(0, len(parts), tensor):
        own = [part.own(x_BSD, dim=1) for part in parts[first : first + tensor]]
        assert torch.equal(torch.cat(own, 1), parts[first].of_context(x_BSD, dim=1))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dim", [1, -2])
def test_in_order_undoes_of_context(grid: tuple[int, int], length: int, dim: int) -> None:
    x_BSD = numbered(length)
    context, tensor = grid
    parts = parts_of(length, *grid)[::tensor]
    gathered = [part.of_context(x_BSD, dim=dim, filler=ABSENT) for part in parts]
    assert len(gathered) == context
    whole = parts[0].in_order(gathered, dim=dim)
    assert whole.shape[1] == parts[0].padded_length
    assert torch.equal(whole[:, :length], x_BSD)
    assert bool((whole[:, length:] == ABSENT).all())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_context_ranks_read_as_many_keys(grid: tuple[int, int], length: int) -> None:
    """A query at position s reads s + 1 keys; absent ones count, because they are computed."""
    keys = [
        sum(position + 1 for span in part.spans for position in range(span.start, span.stop))
        for part in parts_of(length, *grid)[:: grid[1]]
    ]
    assert len(set(keys)) == 1


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fewer_than_a_unit_is_added(grid: tuple[int, int], length: int) -> None:
    context, tensor = grid
    unit = tensor if context == 1 else 2 * context * tensor
    for part in parts_of(length, context, tensor):
        assert part.padded_length % unit == 0
        assert length <= part.padded_length < length + unit


def test_a_gradient_reaches_each_position_once() -> None:
    x_BSD = numbered(13).double().requires_grad_()
    total = sum(part.own(x_BSD, dim=1).sum() for part in parts_of(13, 2, 2))
    assert isinstance(total, Tensor)
    total.backward()
    assert x_BSD.grad is not None and bool((x_BSD.grad == 1).all())


class TestShardedOutput:
    TARGET_BS = torch.tensor([[3, 7, 12, 0, 4], [5, 1, 1, 1, 1]])  # 1 is padding

    def output(self, *, context_index: int = 0, first_word: int = 4, num_words: int = 4) -> ShardedOutput:
        part = SequencePart(length=5, context=2, context_index=context_index)
        return ShardedOutput(shards=LocalShards(), part=part, first_word=first_word, num_words=num_words)

    def test_targets_of_absent_positions_are_left_out(self) -> None:
        first, second = (
            self.output(context_index=index).targets_of(self.TARGET_BS, ignore_index=1) for index in (0, 1)
        )
        assert first.tolist() == [[3, 7, 1, 1], [5, 1, 1, 1]]
        assert second.tolist() == [[12, 0, 4, 1], [1, 1, 1, 1]]
        assert first.dtype == torch.int64

    def test_columns(self) -> None:
        columns = self.output().columns_of(self.TARGET_BS, ignore_index=1)
        assert columns.tolist() == [[4, 3, 4, 4, 0], [1, -1, -1, -1, -1]]

    def test_a_rank_without_words_has_no_column(self) -> None:
        columns = self.output(num_words=0).columns_of(self.TARGET_BS, ignore_index=1)
        assert columns.tolist() == [[0] * 5, [0, -1, -1, -1, -1]]
