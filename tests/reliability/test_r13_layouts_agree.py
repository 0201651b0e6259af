"""R13: the same global batch gives the same gradients, norm and clipped step on every layout of ranks and experts.

All pairs of 1, 2 and 4 ranks and exchange groups of 1, 2 and 4 of them, against one process that takes the same four
micro-batches one after the other. Backends, unclipped steps and other numbers of experts:
``tests/distributed/test_training_equality.py`` and ``test_router_family.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.updates import alone, on_ranks

FLAGS = ("--moe-expert-count", 4, "--clip-norm", 0.1)
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, exchange group)


def _flags(world_size: int, ep_size: int) -> tuple[Any, ...]:
    split = ("--update-freq", 4 // world_size, "--expert-model-parallel-size", ep_size)
    return (*FLAGS, *split, "--ddp-backend", "legacy_ddp")


def _whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def _assert_agrees(found: dict[str, Any], expected: dict[str, Any], *, relative: float) -> None:
    """Gradients, their norm before clipping and the parameters after the step."""
    assert expected["logged"]["gnorm"] > 0.1  # so that clipping does something
    assert expected["logged"]["drop_rate"] == found["logged"]["drop_rate"] == 0
    assert found["logged"]["gnorm"] == pytest.approx(expected["logged"]["gnorm"], rel=relative)
    for kind in ("gradients", "parameters"):
        assert found[kind].keys() == expected[kind].keys()
        ours, theirs = _whole(found[kind]), _whole(expected[kind])
        assert float((ours - theirs).norm() / theirs.norm()) <= relative, kind


def _assert_all_agree(by_rank: list[dict[str, Any]], expected: dict[str, Any], *, relative: float) -> None:
    for found in by_rank:
        _assert_agrees(found, expected, relative=relative)


@pytest.mark.parametrize(("world_size", "ep_size"), LAYOUTS)
def test_every_layout_takes_the_same_clipped_step(world_size: int, ep_size: int) -> None:
    expected = alone(FLAGS, 4)
    _assert_all_agree(on_ranks(_flags(world_size, ep_size), world_size), expected, relative=1e-6)


def test_in_double_precision_thirteen_digits_agree() -> None:
    expected = alone(FLAGS, 4, dtype=torch.float64)
    found = on_ranks(_flags(4, 2), 4, dtype=torch.float64)
    _assert_all_agree(found, expected, relative=1e-13)


@pytest.mark.parametrize(
    ("mutation", "layout"),
    [("no division", (4, 4)), ("no sum over replicas", (4, 2)), ("experts left out of the norm", (2, 2))],
)
def test_these_tests_see_a_wrong_reduction(mutation: str, layout: tuple[int, int]) -> None:
    expected = alone(FLAGS, 4)
    with pytest.raises(AssertionError):
        _assert_all_agree(on_ranks(_flags(*layout), layout[0], mutation=mutation), expected, relative=1e-6)
