"""The injector: inactive unless asked for, and each of its places is used by a test."""

import os
import re
from pathlib import Path

import pytest
import torch

from fairseq_moe.errors import ConfigError
from fairseq_moe.faults import POINTS, VARIABLE, InjectedError, fault

_TESTS = Path(__file__).parent


def test_no_fault_by_default() -> None:
    assert VARIABLE not in os.environ
    for point in POINTS:
        fault(point)


@pytest.mark.parametrize("point", POINTS)
def test_each_place_is_used_by_a_test(point: str) -> None:
    files = [path for path in _TESTS.glob("test_*.py") if path != Path(__file__)]
    assert any(re.search(rf"\b{re.escape(point)}\b", path.read_text()) for path in files), point


def test_the_nth_time_at_that_place_and_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "save.begin@0@2=raise")
    fault("save.begin")
    fault("save.end")
    with pytest.raises(InjectedError, match=r"injected at save\.begin"):
        fault("save.begin")
    fault("save.begin")
    monkeypatch.setenv(VARIABLE, "save.begin@1=raise")
    fault("save.begin")


def test_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "save.begin@0=enospc")
    with pytest.raises(OSError, match="No space left on device"):
        fault("save.begin")
    monkeypatch.setenv(VARIABLE, "save.begin@0=oom")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        fault("save.begin")


@pytest.mark.parametrize(
    "text",
    ["save.begin=kill", "save.begin@0=nan", "nowhere@0=kill", "save.begin@x=kill", "save.begin@0=sleep:"],
)
def test_what_is_not_understood_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match="FAIRSEQ_MOE_FAULT is"):
        fault("save.begin")
