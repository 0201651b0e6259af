"""R22, R23, R24: when one rank dies, hangs or fails, all others end soon, with one sentence that says who and why.

Each case is a run of fairseq-train on forked ranks, in which one rank injects a fault into itself.
"""

from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.faults import VARIABLE
from tests.e2e.commands import train_argv
from tests.helpers.backends import AXES, BACKENDS, PIPELINES
from tests.helpers.ranks import CommandResult, run_cli
from tests.reliability.starts import PID_FOLDER

_FLAGS = ("--max-update", "50", "--no-epoch-checkpoints", "--disable-validation")
_TIMEOUT_SEC = 5
_P4 = ("--pipeline-model-parallel-size", 4, "--decoder-layers", 4, "--update-freq", 4)


def _run(data: Path, save_dir: Path, fault: str, *flags: Any, world_size: int = 4) -> CommandResult:
    argv = train_argv(data, save_dir, *_FLAGS, *flags)
    env = {VARIABLE: fault, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return run_cli("fairseq_cli.train", argv, world_size=world_size, env=env, timeout=100, may_die=True)


def _seconds_after(result: CommandResult, rank: int) -> float:
    return max(result.ended_sec) - result.ended_sec[rank]


def _errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("fairseq_moe: error: ")]


@pytest.mark.parametrize("layout", ["", *AXES])
def test_a_killed_rank_is_named_with_its_update(layout: str, text_data: Path, tmp_path: Path) -> None:
    result = _run(text_data, tmp_path, "train.forward@1@7=kill", *AXES.get(layout, []))
    assert result.exit_codes == [3, -9, 3, 3]
    assert _seconds_after(result, 1) < 15
    for rank in (0, 2, 3):
        assert _errors(result.outputs[rank]) == [
            "fairseq_moe: error: rank 1 lost at update 7 (no sign of life for 4 s)"
        ]
    assert not list(tmp_path.rglob("*.tmp*"))


def test_rank_0_that_takes_the_store_with_it_is_named(text_data: Path, tmp_path: Path) -> None:
    result = _run(text_data, tmp_path, "train.forward@0@3=kill", world_size=2)
    assert result.exit_codes == [-9, 3]
    assert _seconds_after(result, 0) < 15
    assert _errors(result.outputs[1]) == [
        "fairseq_moe: error: rank 0 lost at update 3: the store that it kept does not answer"
    ]


def test_a_middle_stage_that_is_killed_is_named(text_data: Path, tmp_path: Path) -> None:
    result = _run(text_data, tmp_path, "train.forward@1@7=kill", *_P4)
    assert result.exit_codes == [3, -9, 3, 3], result.outputs[0][-1500:]
    assert _seconds_after(result, 1) < 15
    for rank in (0, 2, 3):
        assert _errors(result.outputs[rank]) == [
            "fairseq_moe: error: rank 1 lost at update 2 (no sign of life for 4 s)"
        ]


@pytest.mark.slow_reliability
def test_a_middle_stage_out_of_memory_is_told_by_all(text_data: Path, tmp_path: Path) -> None:
    """Only the two next stages lose a connection to it."""
    result = _run(text_data, tmp_path, "train.forward@2@7=oom", *_P4)
    assert result.exit_codes == [3, 3, 1, 3], result.outputs[0][-1500:]
    assert max(result.ended_sec) - min(result.ended_sec) < 15
    cause = "failed at update 2: OutOfMemoryError: out of memory (injected at train.forward)"
    for rank, output in enumerate(result.outputs):
        (error,) = _errors(output)
        assert error.startswith(f"fairseq_moe: error: {'this rank' if rank == 2 else 'rank 2'} {cause}")


@pytest.mark.slow_reliability
@pytest.mark.parametrize("stage", [1, 2])
def test_a_middle_stage_that_is_stopped_is_named(stage: int, text_data: Path, tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    flags = (*_FLAGS, *_P4, "--collective-timeout-sec", _TIMEOUT_SEC)
    result = run_cli(
        "tests.reliability.starts",
        train_argv(text_data, tmp_path / "save", *flags),
        world_size=4,
        env={VARIABLE: f"train.forward@{stage}@7=stop", PID_FOLDER: str(tmp_path / "pids")},
        function="train_then_be_killed",
        may_die=True,
    )
    assert result.exit_codes == [-9 if rank == stage else 3 for rank in range(4)], result.outputs[0][-1500:]
    for rank in {0, 1, 2, 3} - {stage}:
        (error,) = _errors(result.outputs[rank])
        expected = f"fairseq_moe: error: rank {stage} lost at update 2 (no sign of life for 4 s)"
        assert error.removesuffix(f"; stacks of rank {rank}:") == expected  # of one that was not done waiting


@pytest.mark.slow_reliability
@pytest.mark.parametrize("layout", ["", *AXES, *PIPELINES])
def test_a_stopped_rank_is_named_after_the_timeout(layout: str, text_data: Path, tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    flags = (*_FLAGS, *(AXES | PIPELINES).get(layout, []))
    argv = train_argv(text_data, tmp_path / "save", *flags, "--collective-timeout-sec", _TIMEOUT_SEC)
    env = {VARIABLE: "train.forward@1@4=stop", PID_FOLDER: str(tmp_path / "pids")}
    result = run_cli(
        "tests.reliability.starts", argv, world_size=2, env=env, function="train_then_be_killed", may_die=True
    )
    assert result.exit_codes == [3, -9], result.outputs[1][-1500:]
    assert _errors(result.outputs[0]) == [
        "fairseq_moe: error: rank 1 lost at update 4 (no sign of life for 4 s)"
    ]
    assert "Timed out waiting 5000ms" in result.outputs[0]  # from the flag
    assert "in trainer_train_step" in result.outputs[0]  # where this rank has waited


def test_a_rank_that_hangs_is_named_and_shows_where(text_data: Path, tmp_path: Path) -> None:
    flags = ("--collective-timeout-sec", _TIMEOUT_SEC)
    result = _run(text_data, tmp_path, "train.forward@1@3=sleep:300", *flags, world_size=2)
    assert result.exit_codes == [3, 3]
    assert "Timed out waiting" in result.outputs[0]  # the timeout was the flag's
    sentence = "rank 1 stuck at update 3 (alive, but not where the other ranks have waited for it)"
    for output in result.outputs:
        assert len(_errors(output)) == 1
        assert sentence in output
    assert "in _act" in result.outputs[1]  # its stack


@pytest.mark.parametrize(
    ("action", "cause"),
    [("raise", "InjectedError: injected at train.forward"), ("oom", "OutOfMemoryError: out of memory")],
)
@pytest.mark.parametrize(
    ("rank", "backend"),
    [(0, "legacy_ddp"), (1, "legacy_ddp"), (1, "zero3"), (1, "T2"), (0, "C2"), (0, "P2"), (1, "P2")],
)
def test_the_cause_is_told_by_all(
    action: str, cause: str, rank: int, backend: str, text_data: Path, tmp_path: Path
) -> None:
    flags = (BACKENDS | AXES | PIPELINES)[backend]
    result = _run(text_data, tmp_path, f"train.forward@{rank}@3={action}", *flags, world_size=2)
    assert result.exit_codes[rank] == 1
    assert result.exit_codes[1 - rank] == 3
    assert max(result.ended_sec) - min(result.ended_sec) < 15
    assert f"fairseq_moe: error: this rank failed at update 3: {cause}" in result.outputs[rank]
    assert "in _act" in result.outputs[rank]  # the traceback
    assert len(_errors(result.outputs[1 - rank])) == 1
    assert f"fairseq_moe: error: rank {rank} failed at update 3: {cause}" in result.outputs[1 - rank]
    assert not (tmp_path / "crash.pt").exists()


def test_out_of_memory_in_validation_is_told_too(text_data: Path, tmp_path: Path) -> None:
    argv = train_argv(text_data, tmp_path, "--max-update", "2")
    env = {VARIABLE: "valid.forward@1=oom"}
    result = run_cli("fairseq_cli.train", argv, world_size=2, env=env, may_die=True)
    assert result.exit_codes == [3, 1]
    assert "fairseq_moe: error: rank 1 failed at update 2: OutOfMemoryError" in result.outputs[0]


def test_a_user_error_of_one_rank_is_a_sentence_on_all(text_data: Path, tmp_path: Path) -> None:
    argv = train_argv(text_data, tmp_path, *_FLAGS)
    result = run_cli(
        "tests.reliability.starts", argv, world_size=2, function="train_until_a_user_error", may_die=True
    )
    assert result.exit_codes == [3, 2]
    assert _errors(result.outputs[0]) == ["fairseq_moe: error: rank 1 failed at update 2: mend this."]
    assert _errors(result.outputs[1]) == ["fairseq_moe: error: mend this."]
    assert "Traceback" not in result.output


def _run_without(guard: str, data: Path, save_dir: Path, fault: str) -> CommandResult:
    argv = [guard, *train_argv(data, save_dir, *_FLAGS, "--collective-timeout-sec", _TIMEOUT_SEC)]
    return run_cli(
        "tests.reliability.starts",
        argv,
        world_size=2,
        env={VARIABLE: fault},
        function="train_without",
        may_die=True,
    )


def test_without_heartbeats_nobody_knows_the_killed_rank(text_data: Path, tmp_path: Path) -> None:
    result = _run_without("heartbeat", text_data, tmp_path, "train.forward@1@3=kill")
    assert result.exit_codes == [1, -9]
    assert "rank 1 lost" not in result.output


def test_without_its_end_a_rank_out_of_memory_leaves_the_others_waiting(
    text_data: Path, tmp_path: Path
) -> None:
    result = _run_without("end at out of memory", text_data, tmp_path, "train.forward@1@3=oom")
    assert "attempting to recover from OOM" in result.outputs[1]
    assert "Timed out waiting 5000ms" in result.output
    assert "failed at update 3: OutOfMemoryError" not in result.output
