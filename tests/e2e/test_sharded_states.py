"""--use-distributed-optimizer and --use-torch-fsdp2 through every way to start ranks, and what a run says of them."""

import os
import re
from pathlib import Path

import pytest

from tests.e2e.commands import json_lines, train, train_argv
from tests.e2e.hydra_start import hydra_train
from tests.e2e.processes import slurm_stubs
from tests.helpers.checkpoints import assert_same, contents
from tests.helpers.ranks import CommandResult, run_cli

FLAGS = ("--use-distributed-optimizer", "--use-torch-fsdp2")
SHORT = ("--max-update", "3")


def losses(result: CommandResult, kind: str = "train_inner", name: str = "loss") -> list[str]:
    return [record[name] for record in json_lines(result, kind)]


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("legacy")


@pytest.fixture(scope="module")
def expected(text_data: Path, legacy: Path) -> CommandResult:
    """Two ranks under legacy_ddp; parameters and moments lie in the folder ``legacy``."""
    return train(text_data, legacy, *SHORT, world_size=2)


@pytest.mark.parametrize("flag", FLAGS)
def test_under_torchrun_it_is_the_run_of_legacy_ddp(
    flag: str, text_data: Path, tmp_path: Path, expected: CommandResult, legacy: Path
) -> None:
    flags = (*SHORT, flag, "--overlap-grad-reduce", "--overlap-param-gather")
    found = train(text_data, tmp_path, *flags, world_size=2)
    assert len(losses(found)) == 3
    assert losses(found) == losses(expected)
    assert losses(found, "valid", "valid_loss") == losses(expected, "valid", "valid_loss")
    assert_same(contents(tmp_path / "checkpoint_last.pt"), contents(legacy / "checkpoint_last.pt"))
    assert found.output.count("with torch's fully_shard, in place of --ddp-backend legacy_ddp.") == 1
    assert found.output.count("--overlap-grad-reduce does nothing by itself: on a CPU") == 1
    assert found.output.count("--overlap-param-gather does nothing by itself: on a CPU") == 1


def test_under_srun_it_is_the_run_of_legacy_ddp(
    text_data: Path, tmp_path: Path, expected: CommandResult
) -> None:
    argv = ["fairseq_cli.train", *train_argv(text_data, tmp_path / "save", *SHORT, "--use-torch-fsdp2")]
    env = {"PATH": f"{slurm_stubs(tmp_path)}:{os.environ['PATH']}"}
    found = run_cli("tests.e2e.starts", argv, world_size=2, function="by_srun", env=env)
    assert found.exit_code == 0, found.output[-3000:]
    assert losses(found) == losses(expected)


@pytest.mark.parametrize("flag", ["use_distributed_optimizer", "use_torch_fsdp2"])
def test_hydra_sets_the_flags(flag: str, text_data: Path, tmp_path: Path) -> None:
    found = hydra_train("as_main_module", text_data, tmp_path, f"model.{flag}=true", world_size=2)
    assert found.exit_code == 0, found.output[-3000:]
    assert "with torch's fully_shard, in place of --ddp-backend pytorch_ddp." in found.output
    assert len(re.findall(r'\[train_inner\].*"loss": "([\d.]+)"', found.outputs[0])) == 3


def test_on_one_rank_the_flag_has_no_effect_and_says_so(text_data: Path, tmp_path: Path) -> None:
    found = train(
        text_data, tmp_path, "--max-update", "1", "--use-distributed-optimizer", "--disable-validation"
    )
    assert found.output.count("--use-distributed-optimizer has no effect on one rank") == 1


def test_what_does_not_go_together_ends_before_data_is_read(tmp_path: Path) -> None:
    flags = (*FLAGS, "--ddp-backend", "fully_sharded")
    found = run_cli("fairseq_cli.train", train_argv(tmp_path / "no data", tmp_path, *flags), world_size=2)
    assert found.exit_codes == [2, 2]
    assert "optimizer states; choose one." in found.output
    assert "both shard parameters; leave one out." in found.output
    assert "Traceback" not in found.output
