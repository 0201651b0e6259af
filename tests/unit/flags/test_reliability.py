"""The flags about failures: what is refused, and where a run's configuration is asked."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from fairseq_moe.flags.moe_checks import moe_problems
from fairseq_moe.flags.reliability import ReliabilityConfig


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_skipped_updates", 0),
        ("collective_timeout_sec", 0.0),
        ("collective_timeout_sec", math.inf),
        ("collective_timeout_sec", math.nan),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_flag(flag: str, value: Any) -> None:
    [problem] = ReliabilityConfig.from_args({flag: value}).problems()
    assert problem.startswith(f"--{flag.replace('_', '-')} is {value}, expected ")


def test_defaults_are_fine_and_flags_that_are_not_there_keep_them() -> None:
    assert ReliabilityConfig.from_args(SimpleNamespace()) == ReliabilityConfig()
    assert ReliabilityConfig().problems() == []


@pytest.mark.parametrize(("experts", "refused"), [(4, True), (0, False)])
def test_only_runs_with_experts_are_asked(
    experts: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq_moe.flags.moe_checks.stock_flag_problems", lambda cfg: [])
    model = SimpleNamespace(
        moe_freq=2 if experts else 0, moe_expert_count=experts, decoder_layers=2, max_skipped_updates=0
    )
    found = moe_problems(SimpleNamespace(model=model), world_size=1)
    assert any("--max-skipped-updates" in problem for problem in found) is refused
