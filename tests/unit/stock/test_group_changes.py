"""Settings of the optimizer in a checkpoint beside those of this run: differences are phrases, never a stack trace."""

import pytest

from fairseq_moe.stock.checkpoint.changes import group_changes

GROUP = {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.98)}


def test_the_same_values_are_no_change() -> None:
    assert group_changes([GROUP], [{**GROUP, "lr": 0.2, "betas": [0.9, 0.98]}], None) == []


def test_another_value_names_the_override() -> None:
    (phrase,) = group_changes([GROUP], [{**GROUP, "betas": (0.8, 0.98)}], None)
    assert phrase.startswith(
        "betas is (0.9, 0.98) in the checkpoint and (0.8, 0.98) in this run (pass --optim"
    )
    assert group_changes([GROUP], [{**GROUP, "betas": (0.8, 0.98)}], {"betas": (0.8, 0.98)}) == []


@pytest.mark.parametrize("number", [0, 2])
def test_another_number_of_groups_is_said(number: int) -> None:
    (phrase,) = group_changes([GROUP], [GROUP] * number, None)
    assert phrase.startswith(
        f"the optimizer has 1 groups of parameters in the checkpoint and {number} in this run"
    )
    assert "--reset-optimizer" in phrase
