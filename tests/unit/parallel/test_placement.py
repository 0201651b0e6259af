"""How parameters lie on hand-drawn grids of ranks, and what that means for their gradients."""

from types import SimpleNamespace

import pytest

from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import (
    COPIED_OVER,
    DENSE,
    EXPERT,
    TENSOR_COLUMNS,
    TENSOR_GATED_ROWS,
    TENSOR_ROWS,
    Cut,
    Placement,
    expert_placements,
    gradient_divisor,
    holds_first_copy,
    is_expert,
    num_copies,
    place,
    placement_of,
    shard,
    vocabulary_placement,
)
from fairseq_moe.parallel.ranks import DENSE_AXES, EXPERT_AXES, RankGrid

# (experts, ranks, given columns) -> copies of an expert, of the W of a dense parameter
GRIDS = [
    (1, 1, None, 1),
    (8, 1, None, 1),
    (8, 4, None, 1),  # 2 experts each
    (4, 4, None, 1),
    (2, 8, None, 4),  # ranks 0 2 4 6 hold the one, 1 3 5 7 the other
    (1, 4, None, 4),
    (8, 4, 2, 2),  # 4 experts each, twice
    (8, 4, 1, 4),
]


@pytest.mark.parametrize(("num_experts", "world_size", "ep_size", "copies"), GRIDS)
def test_copies_of_an_expert_are_its_replicas_and_of_a_dense_parameter_all_ranks(
    num_experts: int, world_size: int, ep_size: int | None, copies: int
) -> None:
    layout = ExpertLayout(num_experts=num_experts, world_size=world_size, given_ep_size=ep_size)
    held = [layout.local_ids(rank) for rank in range(world_size)]
    assert num_copies(EXPERT, layout.ranks) == copies == held.count(held[-1])
    assert num_copies(DENSE, layout.ranks) == world_size


@pytest.mark.parametrize(("num_experts", "world_size", "ep_size", "copies"), GRIDS)
def test_gradients_are_divided_by_data_ranks_however_many_the_backend_has_averaged(
    num_experts: int, world_size: int, ep_size: int | None, copies: int
) -> None:
    layout = ExpertLayout(num_experts=num_experts, world_size=world_size, given_ep_size=ep_size)
    expert, dense = sharded(EXPERT), sharded(DENSE)
    assert num_copies(expert, layout.ranks) == num_copies(dense, layout.ranks) == 1
    assert gradient_divisor(EXPERT, layout.ranks) == world_size
    assert gradient_divisor(expert, layout.ranks) * copies == world_size
    assert gradient_divisor(dense, layout.ranks) == 1  # what stock's own backends have done
    # One rank's share of the sum is 3: whoever sums, the gradient is copies * 3 / data ranks.
    summed = copies * (3 / gradient_divisor(EXPERT, layout.ranks))
    averaged = 3 / gradient_divisor(expert, layout.ranks)
    assert summed == pytest.approx(averaged, rel=1e-15)


def sharded(placement: Placement) -> Placement:
    parameter = SimpleNamespace()
    place([parameter], placement)
    shard(parameter)
    return placement_of(parameter)


def test_shards_stay_what_their_parameter_was() -> None:
    assert sharded(EXPERT).cuts == EXPERT.cuts
    assert sharded(EXPERT).summed_over == EXPERT.summed_over
    assert sharded(DENSE).summed_over == DENSE.summed_over
    assert sharded(DENSE) != sharded(EXPERT)


# Every axis is longer than 1: 2 stages of 3 x 2 x 2 ranks, which hold experts 3 x 2 ways, each twice.
ALL_AXES = RankGrid(pipe=2, data=3, context=2, tensor=2, expert=3, expert_tensor=2)
FURTHER = {
    "rows of a matrix over tensor": (Placement(stage=DENSE_AXES, cuts=(Cut("tensor", 0),)), 6),
    "expert matrices over both": (
        Placement(stage=EXPERT_AXES, cuts=(Cut("expert", 0), Cut("expert_tensor", 1))),
        2,
    ),
    "whole": (DENSE, 12),
    "experts": (EXPERT, 4),
}


@pytest.mark.parametrize("name", FURTHER)
def test_copies_are_the_ranks_of_a_stage_that_hold_the_same_part(name: str) -> None:
    placement, copies = FURTHER[name]
    assert num_copies(placement, ALL_AXES) == copies
    parts = [
        tuple(ALL_AXES.coordinate(rank, axis) for axis in ("pipe", *placement.cut_over))
        for rank in range(ALL_AXES.world_size)
    ]
    for members in ALL_AXES.groups(placement.copied_over):
        assert {parts[member] for member in members} == {parts[members[0]]}
        assert parts.count(parts[members[0]]) == copies == len(members)


TABLE = {
    "whole": (DENSE, 12),
    "rows": (TENSOR_ROWS, 6),
    "gated rows": (TENSOR_GATED_ROWS, 6),
    "columns": (TENSOR_COLUMNS, 6),
    "words": (vocabulary_placement(7), 6),
    "experts": (EXPERT, 4),
    **{
        f"expert parts, {name}": (placement, 4 if name == "fc2_bias" else 2)
        for name, placement in expert_placements(is_gated=True, is_cut=True).items()
    },
}


@pytest.mark.parametrize("name", TABLE)
def test_an_entry_of_the_table_says_who_sums_divides_and_writes(name: str) -> None:
    """2 stages of 3 x 2 x 2 ranks (data, context, tensor), which hold experts 3 x 2 ways, each twice."""
    placement, copies = TABLE[name]
    part = sharded(placement)
    assert num_copies(placement, ALL_AXES) == copies
    assert {placement.copied_over, part.copied_over} - {()} <= set(
        COPIED_OVER
    )  # a group, and a slot in the norm
    writers = [rank for rank in range(24) if holds_first_copy(placement, ALL_AXES, rank)]
    assert len(writers) == 24 // copies
    # The sum by data ranks, whether all copies are summed or what is sharded has been averaged.
    averaged = copies // num_copies(part, ALL_AXES)
    assert gradient_divisor(placement, ALL_AXES) == 3
    assert gradient_divisor(part, ALL_AXES) * averaged == 3
    assert averaged == (2 if is_expert(SimpleNamespace(placement=placement)) else 6)


def test_tensor_ranks_hold_copies_of_the_shards_of_what_is_whole_on_them() -> None:
    assert sharded(DENSE).copied_over == ("tensor",)
    assert sharded(TENSOR_ROWS).copied_over == ()
    assert sharded(EXPERT).copied_over == ("expert_tensor",)


def test_a_parameter_without_a_placement_is_dense() -> None:
    assert placement_of(SimpleNamespace()) is DENSE
    assert not is_expert(SimpleNamespace())


def test_a_placed_parameter_says_so_and_only_experts_carry_the_mark_of_stock() -> None:
    dense, expert = SimpleNamespace(), SimpleNamespace()
    place([dense], DENSE)
    place([expert], EXPERT)
    assert (placement_of(dense), placement_of(expert)) == (DENSE, EXPERT)
    assert (is_expert(dense), is_expert(expert)) == (False, True)
    assert (hasattr(dense, "expert"), expert.expert) == (
        False,
        True,
    )  # stock asks whether the attribute is there


def test_what_is_cut_over_experts_and_more_is_still_an_experts() -> None:
    parameter = SimpleNamespace()
    place([parameter], FURTHER["expert matrices over both"][0])
    assert is_expert(parameter)
