"""The flags about profiles: what they name, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from fairseq_moe.flags.profiling import ProfileConfig, profile_problems

WINDOW = {"profile_step_start": 3, "profile_step_end": 4}


def problems(*, experts: bool = True, cpu: bool = True, world_size: int = 2, **flags: Any) -> list[str]:
    cfg = SimpleNamespace(model=SimpleNamespace(**flags), common=SimpleNamespace(cpu=cpu))
    return profile_problems(cfg, has_experts=experts, world_size=world_size)


def test_both_ends_are_profiled_and_rank_0_unless_others_are_named() -> None:
    config = ProfileConfig.from_args(WINDOW)
    assert (list(config.updates or ()), config.ranks) == ([3, 4], [0])
    assert ProfileConfig.from_args({**WINDOW, "profile_ranks": "1 0"}).ranks == [1, 0]
    assert ProfileConfig().updates is None


def test_without_flags_nothing_is_refused() -> None:
    assert problems() == []
    assert problems(experts=False) == []
    assert problems(**WINDOW, profile_ranks="0 1", use_pytorch_profiler=True) == []
    assert problems(**WINDOW, cpu=False) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"profile_step_start": 0, "profile_step_end": 1},
            "--profile-step-start is 0, expected the number of an update",
        ),
        ({"profile_step_start": 4, "profile_step_end": 3}, "expected an end that is not before"),
        ({"profile_step_start": 4}, "--profile-step-start 4 needs --profile-step-end; add it."),
        ({"profile_step_end": 4}, "--profile-step-end 4 needs --profile-step-start; add it."),
        ({"profile_ranks": "1"}, "--profile-ranks, --use-pytorch-profiler: no update is named"),
        ({**WINDOW, "profile_ranks": "1 2 5"}, "names 2, 5, and this run has ranks 0 to 1"),
        ({**WINDOW, "profile_ranks": "-1"}, "--profile-ranks is '-1', expected numbers of ranks"),
        ({**WINDOW, "profile_ranks": ""}, "--profile-ranks is '', expected numbers of ranks"),
        ({**WINDOW, "profile_ranks": "1", "world_size": 1}, "names 1, and this run has rank 0 alone"),
        ({**WINDOW, "experts": False}, "no layer has experts, and only models with experts are profiled"),
        ({**WINDOW, "use_pytorch_profiler": False}, "marks updates for nsys, which needs a GPU"),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_one_sentence(flags: dict[str, Any], words: str) -> None:
    [problem] = problems(**{"use_pytorch_profiler": True, **flags})
    assert words in problem


def test_all_problems_are_told_at_once() -> None:
    assert len(problems(profile_step_start=5, profile_step_end=2, profile_ranks="7")) == 3
