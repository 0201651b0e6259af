"""The helpers themselves: ranks return, raise and hang as the tests on top of them rely on.

Run with ``pytest tests/distributed/test_ranks.py``.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import USER_DIR, RankError, run_cli, run_ranks


def _sum_of_ranks(rank: int, offset: float) -> float:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return float(total)


def test_every_rank_returns_its_result() -> None:
    assert run_ranks(_sum_of_ranks, 3, 0.5) == [4.5, 4.5, 4.5]


def _single(rank: int) -> tuple[int, bool]:
    return rank, dist.is_initialized()


def test_one_rank_has_no_process_group() -> None:
    assert run_ranks(_single, 1) == [(0, False)]


def _raise_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("a bad rank")
    dist.barrier()


def test_exception_of_a_rank_reaches_the_parent_although_another_waits() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: .*ValueError: a bad rank"):
        run_ranks(_raise_on_rank_1, 2)


def _hang_on_rank_1(rank: int) -> None:
    while rank == 1:
        time.sleep(0.1)


def test_hanging_rank_is_ended_at_the_deadline_and_shows_its_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)not done after 2 s|exit code.*_hang_on_rank_1"):
        run_ranks(_hang_on_rank_1, 2, timeout=2.0)
    assert time.monotonic() - start < 15


def test_command_runs_without_a_new_interpreter_and_reports_its_exit(text_data: Path, tmp_path: Path) -> None:
    result = run_cli("fairseq_cli.train", [text_data, "--arch", "nothing_of_that_name"])
    assert result.exit_code == 2
    assert "invalid choice: 'nothing_of_that_name'" in result.output


def test_command_on_two_ranks_trains(text_data: Path, tmp_path: Path) -> None:
    argv = [text_data, "--user-dir", USER_DIR, "--task", "language_modeling", "--arch", "transformer_lm"]
    argv += ["--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 16]
    argv += ["--decoder-attention-heads", 2, "--moe-freq", 2, "--moe-expert-count", 2]
    argv += ["--criterion", "moe_cross_entropy", "--optimizer", "sgd", "--lr", 0.1, "--tokens-per-sample", 16]
    argv += ["--batch-size", 2, "--max-update", 2, "--cpu", "--no-save", "--disable-validation"]
    argv += ["--log-format", "json", "--log-interval", 1, "--save-dir", tmp_path]
    result = run_cli("fairseq_cli.train", argv, world_size=2)
    assert result.exit_codes == [0, 0], result.output
    assert '"num_updates": "2"' in result.outputs[0]


def _configs(rank: int, flags: list[Any]) -> tuple[Any, Any]:
    from tests.helpers import tiny

    tiny._config([])  # fills the cache
    quick = tiny._config(flags)
    del os.environ[tiny.CONFIG_CACHE_VARIABLE]
    return quick, tiny._config(flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--moe-expert-count", 2, "--moe-top1-expert", "--update-freq", 2, "--clip-norm", 0.1, "--lr", 0.25],
        ["--optimizer", "adam", "--fp16", "--checkpoint-activations", "--ddp-backend", "fully_sharded"],
        ["--moe-gate-loss-wt", 0.5, "--memory-efficient-bf16", "--save-dir", "/nowhere", "--dropout", 0.3],
    ],
)
def test_tiny_configurations_are_those_of_fairseq(flags: list[Any]) -> None:
    [(quick, composed)] = run_ranks(_configs, 1, flags)
    assert quick == composed
