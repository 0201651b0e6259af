"""The record of a run: found from whatever stock hands over, one for all copies, finished in order."""

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fairseq_moe.stock import run as runs
from fairseq_moe.stock.run import MoERun, begin_run, end_of_run, run_of


@pytest.fixture(autouse=True)
def no_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_RUNS", [])


def make_run(at_end: Any = None) -> tuple[MoERun, SimpleNamespace, SimpleNamespace]:
    decoder, nothing = nn.Linear(1, 1), SimpleNamespace()
    run = MoERun(decoder=decoder, guard=nothing, state=nothing, at_end=at_end)  # type: ignore[arg-type]
    trainer, task = SimpleNamespace(), SimpleNamespace()
    begin_run(run, trainer, task)
    return run, trainer, task


def test_trainer_task_and_decoder_know_their_run_and_others_have_none() -> None:
    run, trainer, task = make_run()
    other, other_trainer, _ = make_run()
    assert run_of(trainer) is run_of(task) is run_of(run.decoder) is run
    assert run_of(other_trainer) is other is not run
    assert run_of(SimpleNamespace()) is run_of(None) is None


def test_a_copy_of_the_model_belongs_to_the_same_run() -> None:
    run, _, _ = make_run()
    assert run_of(copy.deepcopy(nn.Sequential(run.decoder))[0]) is run


def test_the_end_finishes_runs_in_the_order_of_their_beginning() -> None:
    ended: list[MoERun] = []
    made = [make_run(ended.append) for _ in range(5)]
    end_of_run()
    assert ended == [run for run, _, _ in made]


def test_a_run_lives_as_long_as_its_trainer() -> None:
    ended: list[MoERun] = []
    made = make_run(ended.append)
    del made
    gc.collect()
    end_of_run()
    assert ended == []
