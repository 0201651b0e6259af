"""What cannot be honoured ends with one sentence per problem and exit code 2, before data is read."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, MOE, PLUGIN, eval_lm_argv, train_argv
from tests.e2e.processes import console_script, run_process, torchrun
from tests.helpers.ranks import CommandResult, run_cli

_BAD = ("--moe-freq", "7", "--moe-second-expert-policy", "best", "--moe-eval-capacity-token-fraction", "nan")
_BAD += ("--decoder-layerdrop", "0.5", "--moe-gate-loss-wt", "-1")
_NUM_PROBLEMS = 5


def _sentences(result: CommandResult) -> list[str]:
    """What the plugin says, once it is made sure that nothing else went wrong."""
    assert result.exit_code == 2, result.output[-3000:]
    assert "Traceback" not in result.output
    return re.findall(r"^fairseq_moe: error: (.*\.)$", result.output, flags=re.MULTILINE)


def test_all_problems_at_once_before_data_is_read_or_ranks_are_started(tmp_path: Path) -> None:
    argv = train_argv(tmp_path / "no data", tmp_path, *_BAD, "--distributed-world-size", "3")
    result = run_cli("fairseq_cli.train", argv)
    sentences = _sentences(result)
    assert len(sentences) == _NUM_PROBLEMS + 1
    assert "4 experts do not fit 3 ranks" in result.output
    assert "distributed init" not in result.output
    for flag in _BAD[::2]:
        assert sum(flag in sentence for sentence in sentences) == 1, flag


@pytest.mark.slow
def test_rank_0_speaks_under_torchrun(tmp_path: Path) -> None:
    argv = train_argv(tmp_path / "no data", tmp_path, *_BAD)
    result = run_process(*torchrun(2), console_script("fairseq-train"), *argv, cwd=tmp_path)
    said = re.findall(r"^fairseq_moe: error: .*$", result.output, flags=re.MULTILINE)
    assert len(said) == _NUM_PROBLEMS
    assert result.exit_code != 0
    assert 'File "' not in result.output.split("torch/distributed")[0]  # torchrun prints a trace of its own


@pytest.mark.slow
def test_rank_0_speaks_for_spawned_ranks(text_data: Path, tmp_path: Path) -> None:
    flags = ("--restore-file", tmp_path / "missing.pt", "--distributed-world-size", "2")
    argv = train_argv(text_data, tmp_path / "save", *flags)
    result = run_process(console_script("fairseq-train"), *argv, cwd=tmp_path)
    (sentence,) = _sentences(result)
    assert "missing.pt does not exist" in sentence


def test_evaluation_on_a_number_of_ranks_that_does_not_fit(text_data: Path, moe_checkpoint: Path) -> None:
    result = run_cli("fairseq_cli.eval_lm", eval_lm_argv(text_data, moe_checkpoint), world_size=3)
    (sentence,) = _sentences(result)
    assert "4 experts do not fit 3 ranks" in sentence
    assert "fairseq_moe: error" in result.outputs[0]


@pytest.mark.parametrize("command", ["eval_lm", "generate", "validate"])
def test_unreadable_checkpoint_is_named(command: str, text_data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"this is not a checkpoint")
    argv: list[Any] = [text_data, *PLUGIN, "--cpu", "--path", broken, "--task", "language_modeling"]
    result = run_cli(f"fairseq_cli.{command}", [*argv, "--batch-size", "1"])
    (sentence,) = _sentences(result)
    assert str(broken) in sentence


def test_mismatch_names_both_values(text_data: Path, moe_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--restore-file", moe_checkpoint, "--moe-expert-count", "8", "--decoder-embed-dim", "32")
    result = run_cli("fairseq_cli.train", train_argv(text_data, tmp_path, *flags))
    (sentence,) = _sentences(result)
    for flag, saved, given in (("moe-expert-count", "4", "8"), ("decoder-embed-dim", "16", "32")):
        assert re.search(rf"{flag}\D*{saved}\D*{given}|{flag}\D*{given}\D*{saved}", sentence), sentence


def test_fp16_without_its_companion_is_refused(tmp_path: Path) -> None:
    argv = train_argv(tmp_path / "no data", tmp_path, "--fp16", model=[*DENSE, *MOE])
    (sentence,) = _sentences(run_cli("fairseq_cli.train", argv))
    assert "--fp16-no-flatten-grads" in sentence
