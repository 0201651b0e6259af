"""R20, R21: SIGTERM saves and stops all ranks after one update, SIGUSR1 saves and goes on; whenever they come.

The ranks are those of torchrun; each case is a run of fairseq-train that sends the signal to itself.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import train_argv
from tests.helpers.backends import AXES, BACKENDS, PIPELINES
from tests.helpers.ranks import CommandResult, RankError, run_cli, run_ranks
from tests.reliability.starts import signal_at

PARTS = AXES | PIPELINES

_TRAIN_STEP = "fairseq.trainer:Trainer.train_step"
_VALID_STEP = "fairseq.trainer:Trainer.valid_step"
_SAVE = "fairseq.checkpoint_utils:save_checkpoint"
_LOAD = "fairseq.checkpoint_utils:load_checkpoint"

# Dropout and the branch's random choice of the second expert are on, so a resume must restore all of it.
_FLAGS = (
    "--dropout",
    "0.1",
    "--validate-interval-updates",
    "2",
    "--no-epoch-checkpoints",
    "--max-update",
    "6",
)


def _run(data: Path, save_dir: Path, *flags: Any, world_size: int = 2, **signals: Any) -> CommandResult:
    argv = train_argv(data, save_dir, *_FLAGS, *flags)
    env = signal_at(**signals) if signals else {}
    result = run_cli(
        "tests.reliability.starts", argv, world_size=world_size, function="train", env=env, timeout=100
    )
    assert result.exit_codes == [0] * world_size, result.output[-3000:]
    return result


def _digests(result: CommandResult) -> list[str]:
    return re.findall(r"^digest (\w+)$", result.output, re.MULTILINE)


def _saved(result: CommandResult) -> list[tuple[str, int]]:
    """Main files that were written, with their updates."""
    found = re.findall(r"Saved checkpoint \S*/(\S+) \(epoch \d+ @ (\d+) updates", result.output)
    return [(name, int(update)) for name, update in found]


@pytest.fixture(scope="module")
def whole(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Digests of the ranks after six updates without a signal."""
    digests = _digests(_run(text_data, tmp_path_factory.mktemp("whole")))
    assert len(digests) == 2
    return digests


@pytest.mark.parametrize(
    ("target", "nth", "ranks", "update"),
    [
        (_LOAD, 1, [1], 1),  # nothing trained yet
        (_TRAIN_STEP, 3, [1], 3),
        (_TRAIN_STEP, 3, [0, 1], 3),
        (_VALID_STEP, 2, [1], 2),
        (_SAVE, 1, [0], 3),  # the next update brings the word round
    ],
    ids=["before training", "training", "training, all ranks", "validation", "save"],
)
def test_sigterm_saves_stops_and_resumes_to_the_bit(
    target: str, nth: int, ranks: list[int], update: int, text_data: Path, tmp_path: Path, whole: list[str]
) -> None:
    interval = ["--save-interval-updates", "2"] if target == _SAVE else []
    stopped = _run(text_data, tmp_path, *interval, target=target, nth=nth, ranks=ranks, name="SIGTERM")
    assert _saved(stopped)[-1] == ("checkpoint_last.pt", update)
    assert f"training stops after update {update}: SIGTERM" in stopped.output
    if target == _VALID_STEP:
        assert not (tmp_path / "checkpoint_best.pt").exists()
    assert _digests(_run(text_data, tmp_path)) == whole


@pytest.mark.slow_reliability
@pytest.mark.parametrize("flags", [BACKENDS["zero3"], *PARTS.values()], ids=["zero3", *PARTS])
def test_parts_of_states_are_saved_at_sigterm_too(flags: list[str], text_data: Path, tmp_path: Path) -> None:
    whole = _digests(_run(text_data, tmp_path / "whole", *flags))
    signal_of_one_rank = {"target": _TRAIN_STEP, "nth": 3, "ranks": [1], "name": "SIGTERM"}
    stopped = _run(text_data, tmp_path / "halves", *flags, **signal_of_one_rank)
    assert _saved(stopped)[-1] == ("checkpoint_last.pt", 3)
    assert _digests(_run(text_data, tmp_path / "halves", *flags)) == whole
    assert len(set(whole)) == 2


@pytest.mark.slow_reliability
@pytest.mark.timeout(300)  # three runs of four ranks
def test_a_signal_to_a_middle_stage_stops_all_of_them(text_data: Path, tmp_path: Path) -> None:
    flags = ("--pipeline-model-parallel-size", 4, "--decoder-layers", 4, "--update-freq", 2)
    whole = _digests(_run(text_data, tmp_path / "whole", *flags, world_size=4))
    signal_of_one_stage = {"target": _TRAIN_STEP, "nth": 3, "ranks": [2], "name": "SIGTERM"}
    stopped = _run(text_data, tmp_path / "halves", *flags, world_size=4, **signal_of_one_stage)
    assert _saved(stopped)[-1] == ("checkpoint_last.pt", 3)
    assert _digests(_run(text_data, tmp_path / "halves", *flags, world_size=4)) == whole
    assert len(set(whole)) == 4


@pytest.mark.parametrize(
    ("target", "nth", "update"), [(_TRAIN_STEP, 3, 3), (_VALID_STEP, 2, 2)], ids=["training", "validation"]
)
def test_sigusr1_saves_and_goes_on(
    target: str, nth: int, update: int, text_data: Path, tmp_path: Path, whole: list[str]
) -> None:
    flags = ("--no-last-checkpoints",)  # the signal's checkpoint is written all the same
    result = _run(text_data, tmp_path, *flags, target=target, nth=nth, ranks=[1], name="SIGUSR1")
    assert ("checkpoint_last.pt", update) in _saved(result)
    assert result.output.count('| valid | {"epoch"') == 3
    assert _digests(result) == whole


def test_without_handlers_the_rank_dies_and_nothing_is_saved(text_data: Path, tmp_path: Path) -> None:
    result = run_cli(
        "tests.reliability.starts",
        ["handlers", *train_argv(text_data, tmp_path, *_FLAGS)],
        world_size=2,
        env=signal_at(_TRAIN_STEP, nth=3, ranks=[1], name="SIGTERM"),
        function="train_without",
        may_die=True,
    )
    assert result.exit_codes[1] == -signal.SIGTERM
    assert _saved(result) == []


def _second_signal(rank: int, pause_sec: float) -> None:
    import fairseq_moe.stock.step.signals as signals

    signals._SAME_SIGNAL_SEC = 0.1
    asked = signals.Signals()
    asked.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.stop
    time.sleep(pause_sec)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    with pytest.raises(RankError, match=f"died with exit code {128 + signal.SIGTERM}"):
        run_ranks(_second_signal, 1, 0.2)


def test_a_launcher_that_passes_on_what_the_rank_has_got_already_ends_nothing() -> None:
    run_ranks(_second_signal, 1, 0.0)
