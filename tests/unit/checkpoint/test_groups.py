"""Hyper-parameters of parameter groups, without torch's numbers."""

from fairseq_moe.checkpoint.groups import hyperparameters


def test_numbers_of_parameters_are_left_out_and_the_groups_stay_as_they_are() -> None:
    groups = [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "betas": (0.9, 0.98), "params": [2]}]
    assert hyperparameters(groups) == [{"lr": 0.1}, {"lr": 0.2, "betas": (0.9, 0.98)}]
    assert groups[0]["params"] == [0, 1]
