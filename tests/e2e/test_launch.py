"""Every way to start ranks on a CPU machine, and every way to name the plugin.

Most commands run as forks that carry the environment of the launcher; three real ones show that it holds.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import (
    BASE,
    DENSE,
    MOE,
    eval_lm,
    eval_lm_argv,
    json_lines,
    perplexity,
    train,
    train_argv,
)
from tests.e2e.processes import console_script, run_process, slurm_stubs, torchrun
from tests.helpers.ranks import REPOSITORY, USER_DIR, CommandResult, run_cli, run_ranks

_SHORT = ("--max-update", "2", "--disable-validation")


def _losses(result: CommandResult) -> list[str]:
    return [record["loss"] for record in json_lines(result, "train_inner")]


@pytest.fixture(scope="module")
def expected(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Losses of two updates on two ranks under torchrun's environment."""
    result = train(text_data, tmp_path_factory.mktemp("expected"), *_SHORT, world_size=2)
    assert len(_losses(result)) == 2
    assert result.outputs[1].count("train_inner") == 0  # rank 0 speaks
    return _losses(result)


@pytest.mark.slow
def test_one_command_spawns_its_ranks(text_data: Path, tmp_path: Path, expected: list[str]) -> None:
    argv = train_argv(text_data, tmp_path / "save", *_SHORT, "--distributed-world-size", "2")
    result = run_process(console_script("fairseq-train"), *argv, cwd=tmp_path)
    assert result.exit_code == 0, result.output[-3000:]
    assert _losses(result) == expected


@pytest.mark.slow
def test_torchrun_starts_the_console_script(text_data: Path, tmp_path: Path, expected: list[str]) -> None:
    argv = train_argv(text_data, tmp_path / "save", *_SHORT)
    result = run_process(*torchrun(2), console_script("fairseq-train"), *argv, cwd=tmp_path)
    assert result.exit_code == 0, result.output[-3000:]
    assert _losses(result) == expected


@pytest.mark.slow
def test_installed_package_is_found_by_its_name_from_any_directory(
    text_data: Path, moe_checkpoint: Path, tmp_path: Path, perplexity_alone: float
) -> None:
    # fairseq, its commands and the plugin side by side, as in site-packages; stock looks in fairseq/.. for a
    # plain name, so fairseq must be a directory there and not a link to one.
    site = tmp_path / "site"
    (site / "fairseq").mkdir(parents=True)
    found = importlib.util.find_spec("fairseq")
    assert found is not None
    stock = Path(str(found.origin)).resolve().parent
    for source in (*stock.iterdir(), stock.parent / "fairseq_cli", REPOSITORY / "fairseq_moe"):
        (site / source.relative_to(stock.parent if source.parent == stock else source.parent)).symlink_to(
            source
        )
    argv = eval_lm_argv(text_data, moe_checkpoint, "--distributed-world-size", "2")
    argv[argv.index(USER_DIR)] = "fairseq_moe"
    result = run_process(sys.executable, "-m", "fairseq_cli.eval_lm", *argv, cwd=tmp_path, python_path=site)
    assert result.exit_code == 0, result.output[-3000:]
    assert perplexity(result) == perplexity_alone


@pytest.mark.parametrize("start", ["by_init_method", "by_srun", "as_main_module", "as_script"])
def test_other_launchers_give_the_same_training(
    start: str, text_data: Path, tmp_path: Path, expected: list[str]
) -> None:
    argv = ["fairseq_cli.train", *train_argv(text_data, tmp_path / "save", *_SHORT)]
    env = {"PATH": f"{slurm_stubs(tmp_path)}:{os.environ['PATH']}"}
    result = run_cli("tests.e2e.starts", argv, world_size=2, function=start, env=env)
    assert result.exit_code == 0, result.output[-3000:]
    assert _losses(result) == expected


@pytest.mark.parametrize("start", ["as_main_module", "as_script"])
def test_evaluation_started_as_main_module_sums_over_ranks(
    start: str, text_data: Path, moe_checkpoint: Path, perplexity_alone: float
) -> None:
    argv = ["fairseq_cli.eval_lm", *eval_lm_argv(text_data, moe_checkpoint)]
    together = run_cli("tests.e2e.starts", argv, world_size=2, function=start)
    assert together.exit_code == 0, together.output[-3000:]
    assert perplexity(together) == perplexity_alone


@pytest.fixture(scope="module")
def perplexity_alone(text_data: Path, moe_checkpoint: Path) -> float:
    """Of one process."""
    return perplexity(eval_lm(text_data, moe_checkpoint))


_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
_SRUN = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "node[1]",
}


@pytest.mark.parametrize(
    ("launcher", "flags", "sentence"),
    [
        (_TORCHRUN, ("--distributed-world-size", "3"), "is 3 but torchrun has started 2 processes"),
        (_SRUN, ("--distributed-world-size", "3"), "is 3 but this SLURM step has 2 tasks"),
        (_SRUN | {"PATH": "/nowhere"}, (), "cannot expand the SLURM node list 'node[1]' with scontrol"),
        ({}, ("--distributed-init-method", "tcp://a:1", "--distributed-rank", "1"), "--distributed-no-spawn"),
    ],
    ids=["torchrun", "srun", "no scontrol", "one rank of CPU ranks"],
)
def test_launch_that_cannot_work_is_refused(
    launcher: dict[str, str], flags: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    argv = train_argv(tmp_path / "no data", tmp_path / "save", *flags)
    result = run_cli("fairseq_cli.train", argv, env=launcher)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_dense_run_on_two_ranks_resumes(text_data: Path, tmp_path: Path) -> None:
    flags = ("--ddp-backend", "pytorch_ddp", "--disable-validation")
    whole = train(text_data, tmp_path / "whole", *flags, world_size=2, model=DENSE)
    train(text_data, tmp_path / "parts", *flags, "--max-update", "2", world_size=2, model=DENSE)
    rest = train(text_data, tmp_path / "parts", *flags, world_size=2, model=DENSE)
    assert _losses(rest) == _losses(whole)[2:]


def test_import_of_the_package_comes_first_or_second(tmp_path: Path) -> None:
    check = (
        "from fairseq.models import ARCH_MODEL_REGISTRY as archs; from fairseq.criterions import "
        "CRITERION_REGISTRY as criterions; import fairseq.utils, sys; "
        "assert archs['transformer_lm_gpt'].__name__ == 'MoETransformerLanguageModel'; "
        "assert 'moe_cross_entropy' in criterions; "
        "assert fairseq.utils.clip_grad_norm_.__fairseq_moe_seam__; "
        "assert not any(name.startswith('fairseq_cli.') for name in sys.modules)"
    )
    first = run_process(sys.executable, "-c", f"import fairseq_moe; import fairseq; {check}", cwd=tmp_path)
    assert first.exit_code == 0, first.output[-3000:]
    run_ranks(_import_second, 1, check)


def _import_second(rank: int, check: str) -> None:
    import fairseq  # noqa: F401

    import fairseq_moe  # noqa: F401

    exec(check)


def test_user_dir_after_an_import_takes_any_spelling(text_data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(REPOSITORY, target_is_directory=True)
    run_ranks(_parse_with_spellings, 1, str(tmp_path), str(text_data))


def _parse_with_spellings(rank: int, folder: str, data: str) -> None:
    os.chdir(folder)
    from fairseq import options

    import fairseq_moe  # noqa: F401

    absolute = str(REPOSITORY / "fairseq_moe")
    for spelling in ("fairseq_moe", absolute, f"{absolute}/", "link/fairseq_moe"):
        sys.argv = ["fairseq-train", data, "--user-dir", spelling, *BASE, *DENSE, *MOE]
        args = options.parse_args_and_arch(options.get_training_parser())
        assert args.moe_expert_count == 4


def _tasks(rank: int, variables: dict[str, str]) -> int:
    """How many tasks the launcher sees with these SLURM variables and no others."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    os.environ.update(variables)
    import fairseq_moe.stock.start.launch as launch

    return launch._tasks_of_slurm_step()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 2),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_PROCID": "1"}, 4),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, 1),
        ({"SLURM_NTASKS": "4"}, 1),
        ({}, 1),
    ],
)
def test_slurm_step_is_told_from_a_batch_script(variables: dict[str, str], expected: int) -> None:
    assert run_ranks(_tasks, 1, variables) == [expected]
