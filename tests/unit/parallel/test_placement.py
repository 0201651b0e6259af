"""How parameters lie on hand-drawn grids of ranks, and what that means for their gradients."""

from types import SimpleNamespace

import pytest

from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import (
    DENSE,
    EXPERT,
    Placement,
    gradient_divisor,
    is_expert,
    num_copies,
    place,
    placement_of,
)

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
    assert num_copies(EXPERT, layout) == copies == held.count(held[-1])
    assert num_copies(DENSE, layout) == world_size


@pytest.mark.parametrize(("num_experts", "world_size", "ep_size", "copies"), GRIDS)
def test_gradients_are_divided_by_data_ranks_however_many_the_backend_has_averaged(
    num_experts: int, world_size: int, ep_size: int | None, copies: int
) -> None:
    layout = ExpertLayout(num_experts=num_experts, world_size=world_size, given_ep_size=ep_size)
    assert gradient_divisor(EXPERT, layout, is_averaged=False) == world_size
    assert gradient_divisor(EXPERT, layout, is_averaged=True) * copies == world_size
    assert gradient_divisor(DENSE, layout, is_averaged=True) == 1  # what stock's own backends have done
    # One rank's share of the sum is 3: whoever sums, the gradient is copies * 3 / data ranks.
    summed = copies * (3 / gradient_divisor(EXPERT, layout, is_averaged=False))
    averaged = 3 / gradient_divisor(EXPERT, layout, is_averaged=True)
    assert summed == pytest.approx(averaged, rel=1e-15)


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
    place([parameter], Placement(cut_over=("expert", "expert_tensor"), copied_over=("expert_replica",)))
    assert is_expert(parameter)
