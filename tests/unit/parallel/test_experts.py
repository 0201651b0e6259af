"""Who owns which expert, on hand-drawn grids."""

import pytest
import torch

from fairseq_moe.errors import ConfigError
from fairseq_moe.parallel.experts import ExpertLayout, layout_problem
from fairseq_moe.parallel.placement import EXPERT, holds_first_copy


def test_more_experts_than_ranks() -> None:
    # ranks    0     1     2     3
    # experts  0 1   2 3   4 5   6 7        one expert group of four ranks
    layout = ExpertLayout(num_experts=8, world_size=4)
    assert (layout.ep_size, layout.num_replicas, layout.num_local_experts) == (4, 1, 2)
    assert [list(layout.local_ids(rank)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(holds_first_copy(EXPERT, layout.ranks, rank) for rank in range(4))


def test_more_ranks_than_experts() -> None:
    # expert   0   1        expert groups {0 1} {2 3} {4 5} {6 7} send tokens to one another,
    # ranks    0   1        replica groups {0 2 4 6} {1 3 5 7} hold the same expert
    #          2   3
    #          4   5
    #          6   7
    layout = ExpertLayout(num_experts=2, world_size=8)
    assert (layout.ep_size, layout.num_replicas, layout.num_local_experts) == (2, 4, 1)
    assert [list(layout.local_ids(rank)) for rank in range(8)] == [[0], [1]] * 4
    assert [holds_first_copy(EXPERT, layout.ranks, rank) for rank in range(8)] == [True, True] + [False] * 6


@pytest.mark.parametrize(
    ("num_experts", "world_size"), [(1, 1), (1, 4), (4, 1), (4, 4), (8, 2), (2, 8), (6, 3)]
)
def test_every_expert_is_somewhere_and_groups_are_partitions(num_experts: int, world_size: int) -> None:
    layout = ExpertLayout(num_experts=num_experts, world_size=world_size)
    ranks = range(world_size)
    owned = [
        expert
        for rank in ranks
        if holds_first_copy(EXPERT, layout.ranks, rank)
        for expert in layout.local_ids(rank)
    ]
    assert owned == list(range(num_experts))
    grid = torch.arange(world_size).view(layout.num_replicas, layout.ep_size)
    for group in grid.tolist():  # ranks that exchange tokens
        assert [expert for other in group for expert in layout.local_ids(other)] == list(range(num_experts))
    for replicas in grid.T.tolist():  # ranks that hold the same experts
        assert len({layout.local_ids(other) for other in replicas}) == 1


@pytest.mark.parametrize(("num_experts", "world_size"), [(6, 4), (4, 6), (3, 2)])
def test_uneven_spread_is_refused_with_both_numbers(num_experts: int, world_size: int) -> None:
    problem = layout_problem(num_experts=num_experts, world_size=world_size)
    assert problem is not None
    assert str(num_experts) in problem and f"{world_size} ranks" in problem
    with pytest.raises(ConfigError, match="--moe-expert-count"):
        ExpertLayout(num_experts=num_experts, world_size=world_size)


def test_ranks_that_share_an_expert_are_neighbours() -> None:
    # expert   0   0'  1   1'       replica groups {0 4} {1 5} {2 6} {3 7}
    # ranks    0   1   2   3
    #          4   5   6   7
    layout = ExpertLayout(num_experts=2, world_size=8, expert_tensor=2)
    assert (layout.ep_size, layout.num_replicas, layout.num_local_experts) == (2, 2, 1)
    assert [list(layout.local_ids(rank)) for rank in range(8)] == [[0], [0], [1], [1]] * 2
    assert [holds_first_copy(EXPERT, layout.ranks, rank) for rank in range(8)] == [True, False] * 2 + [
        False
    ] * 4


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"expert_tensor": 3}, "--expert-tensor-parallel-size is 3, expected a divisor of the 8 ranks."),
        ({"expert_tensor": 0}, "--expert-tensor-parallel-size is 0, expected a divisor of the 8 ranks."),
        ({"expert_tensor": 2, "ep_size": 8}, "the 8 experts and the 4 ranks (8 ranks, 2 for each expert)."),
        ({"expert_tensor": 2, "num_experts": 6}, "6 experts do not fit 4 ranks (8 ranks, 2 for each expert)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(sizes: dict[str, int], sentence: str) -> None:
    problem = layout_problem(**{"num_experts": 8, "world_size": 8, **sizes})
    assert problem is not None
    assert sentence in problem
