"""The laptop's recipe, as it is started, trains two CPU ranks on text."""

import os
from pathlib import Path

import pytest

from fairseq_moe.launch.resolve import resolve
from tests.e2e.commands import json_lines
from tests.e2e.processes import console_script, run_process
from tests.helpers.ranks import run_ranks


def _command(rank: int, arguments: list[str]) -> tuple[str, ...]:
    return resolve(arguments, {}).command


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_laptops_recipe_trains_two_ranks(text_data: Path, tmp_path: Path) -> None:
    own = [f"data_path={text_data}", f"output_path={tmp_path}", "seq_len=32", "flags.warmup_updates=1"]
    raw = ["--max-update", "8", "--log-interval", "1", "--disable-validation"]
    ((program, *words),) = run_ranks(_command, 1, ["laptop", *own, "--", *raw], timeout=100.0)
    assert program == "fairseq-train"
    result = run_process(console_script(program), *words, cwd=tmp_path, timeout=250.0)
    assert result.exit_code == 0, result.output[-3000:]
    assert "training on 2 devices" in result.output
    losses = [float(record["loss"]) for record in json_lines(result, "train_inner")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    (run_dir,) = tmp_path.iterdir()
    assert run_dir.name == "Laptop-TP1PP1EP2CP1VPP1-MBS4GBS8"
    assert "checkpoint_last.pt" in os.listdir(run_dir / "checkpoints")
