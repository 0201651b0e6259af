"""Ranks on hand-drawn grids: their places, their groups along each axis, and grids that do not fit."""

import pytest

from fairseq_moe.errors import ConfigError
from fairseq_moe.parallel.ranks import DENSE_AXES, EXPERT_AXES, RankGrid

# Of one stage (the second one has 8 more):
#   context       0       1             expert         0       1
#   tensor      0   1   0   1           expert_tensor  0   1   0   1
#   data 0      0   1   2   3           replica 0      0   1   2   3
#        1      4   5   6   7                   1      4   5   6   7
CUBE = RankGrid(pipe=2, data=2, context=2, tensor=2, expert=2, expert_tensor=2)


def test_ranks_count_from_the_innermost_axis() -> None:
    assert (CUBE.world_size, CUBE.stage_size, CUBE.expert_replica) == (16, 8, 2)
    places = {axis: CUBE.coordinate(13, axis) for axis in ("pipe", *DENSE_AXES, *EXPERT_AXES)}
    assert places == {
        "pipe": 1,
        "data": 1,
        "context": 0,
        "tensor": 1,
        "expert_replica": 1,
        "expert": 0,
        "expert_tensor": 1,
    }


@pytest.mark.parametrize(
    ("axes", "of_rank_6"),
    [
        (("data",), [2, 6]),
        (("context",), [4, 6]),
        (("tensor",), [6, 7]),
        (("pipe",), [6, 14]),
        (("context", "tensor"), [4, 5, 6, 7]),
        (("data", "context"), [0, 2, 4, 6]),
        (DENSE_AXES, list(range(8))),
        (("expert_replica",), [2, 6]),
        (("expert",), [4, 6]),
        (("expert", "expert_tensor"), [4, 5, 6, 7]),
        (EXPERT_AXES, list(range(8))),
        ((), [6]),
    ],
)
def test_a_group_differs_in_its_axes_alone(axes: tuple[str, ...], of_rank_6: list[int]) -> None:
    assert CUBE.groups(axes)[CUBE.slot(6, axes)] == of_rank_6
    assert CUBE.size(axes) == len(of_rank_6)
    assert sorted(rank for group in CUBE.groups(axes) for rank in group) == list(range(16))
    assert len(CUBE.groups(axes)) == CUBE.num_slots(axes)


def test_experts_of_one_replica_are_neighbours_on_todays_axes() -> None:
    ranks = RankGrid(data=6, expert=2)
    assert ranks.groups(["expert"]) == [[0, 1], [2, 3], [4, 5]]
    assert ranks.groups(["expert_replica"]) == [[0, 2, 4], [1, 3, 5]]
    assert ranks.groups(DENSE_AXES) == [[0, 1, 2, 3, 4, 5]]


def test_axes_of_two_views_have_no_groups() -> None:
    with pytest.raises(ValueError, match="data, expert are not axes of one view"):
        CUBE.groups(("data", "expert"))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"data": 0, "tensor": -1}, "data 0, tensor -1, expected at least 1"),
        ({"data": 4, "expert": 3}, "4 ranks .* do not divide by expert 3 x expert_tensor 1"),
        ({"data": 2, "context": 2, "expert": 4, "expert_tensor": 2}, "expert 4 x expert_tensor 2"),
    ],
)
def test_grids_that_do_not_fit_are_refused(sizes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RankGrid(**sizes)
