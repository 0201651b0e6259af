"""What changed between two starts of a run: honoured, or refused with both values and the flag that allows it.

Run with ``pytest tests/reliability/test_resume_changes.py``. One row per rule of ``stock.checkpoint.changes``;
a command shows that a refusal is one sentence and exit code 2.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import json_lines
from tests.helpers.ranks import USER_DIR, run_cli, run_ranks
from tests.helpers.real_runs import RealRun, train

MEMORY_EFFICIENT = ["--fp16", "--memory-efficient-fp16"]

# Flags of the second start -> what it says. All are seen three updates into an epoch.
REFUSED: dict[str, tuple[list[Any], list[str]]] = {
    "optimizer": (
        ["--optimizer", "adam_of_the_test"],
        ["--optimizer is adam in the checkpoint and adam_of_the_test in this run", "--reset-optimizer"],
    ),
    "precision": (
        MEMORY_EFFICIENT,
        [
            "precision is fp32 (FairseqAdam) in the checkpoint and --memory-efficient-fp16",
            "--reset-optimizer",
        ],
    ),
    "moments' decay": (
        ["--adam-betas", "(0.8,0.9)"],
        ["betas is (0.9, 0.98) in the checkpoint and (0.8, 0.9) in this run", "--optimizer-overrides"],
    ),
    "weight decay": (
        ["--weight-decay", "0.1"],
        [
            "weight_decay is 0.0 in the checkpoint and 0.1 in this run",
            "--optimizer-overrides \"{'weight_decay': 0.1}\"",
        ],
    ),
    "schedule": (
        ["--lr-scheduler", "fixed"],
        ["--lr-scheduler is inverse_sqrt in the checkpoint and fixed in this run", "--reset-lr-scheduler"],
    ),
    "criterion": (
        ["--criterion", "cross_entropy"],
        ["MoECrossEntropyCriterion", "CrossEntropyCriterion", "--reset-optimizer"],
    ),
    "task": (
        ["--task", "language_modeling_of_the_test"],
        ["--task is language_modeling in the checkpoint", "--reset-dataloader"],
    ),
    "batch size": (
        ["--batch-size", 4],
        ["--batch-size is 2 in the checkpoint and 4 in this run", "--reset-dataloader"],
    ),
    "tokens": (
        ["--max-tokens", 64],
        ["--max-tokens is None in the checkpoint and 64 in this run", "--reset-dataloader"],
    ),
    "multiple": (
        ["--required-batch-size-multiple", 2],
        ["--required-batch-size-multiple is 1 in the checkpoint and 2 in this run", "--reset-dataloader"],
    ),
    "block size": (
        ["--tokens-per-sample", 16, "--max-target-positions", 32],
        ["--tokens-per-sample is 32 in the checkpoint and 16 in this run", "--reset-dataloader"],
    ),
    "breaks": (
        ["--sample-break-mode", "eos"],
        ["--sample-break-mode is none in the checkpoint and eos in this run", "--reset-dataloader"],
    ),
    "subset": (
        ["--train-subset", "valid"],
        ["--train-subset is train in the checkpoint and valid in this run", "--reset-dataloader"],
    ),
    "seed": (["--seed", 4], ["--seed is 3 in the checkpoint and 4 in this run", "--reset-dataloader"]),
    "width": (
        ["--decoder-ffn-embed-dim", 64],
        ["--decoder-ffn-embed-dim is 32 in the checkpoint and 64 in this run"],
    ),
}
ALLOWED: dict[str, list[Any]] = {
    "optimizer": ["--optimizer", "adam_of_the_test", "--reset-optimizer"],
    "precision": [*MEMORY_EFFICIENT, "--reset-optimizer"],
    "half-precision moments": ["--fp16-adam-stats"],
    "weight decay": ["--weight-decay", 0.1, "--optimizer-overrides", "{'weight_decay': 0.1}"],
    "schedule": ["--lr-scheduler", "fixed", "--reset-lr-scheduler"],
    "criterion": ["--criterion", "cross_entropy", "--reset-optimizer"],
    "batch size": ["--batch-size", 4, "--reset-dataloader"],
    "block size": ["--tokens-per-sample", 16, "--max-target-positions", 32, "--reset-dataloader"],
    "seed": ["--seed", 4, "--reset-dataloader"],
    "several": ["--batch-size", 4, "--lr-scheduler", "fixed", "--reset-dataloader", "--reset-lr-scheduler"],
    "learning rate": ["--lr", 0.5],
    "accumulation": ["--update-freq", 2],
    "clipping": ["--clip-norm", 0.1],
    "backend": ["--ddp-backend", "pytorch_ddp"],
    "dropout": ["--dropout", 0.3],
    "experts in FP8": ["--moe-fp8", "emulate"],
    "first weights": ["--lr-scheduler", "fixed", "--batch-size", 4, "--finetune-from-model"],
}


def _register() -> None:
    """Another task and another optimizer by name, which take the same flags."""
    from fairseq.optim import register_optimizer
    from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
    from fairseq.tasks import register_task
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    @register_task("language_modeling_of_the_test", dataclass=LanguageModelingConfig)
    class AnotherTask(LanguageModelingTask):  # type: ignore[misc]
        pass

    @register_optimizer("adam_of_the_test", dataclass=FairseqAdamConfig)
    class AnotherOptimizer(FairseqAdam):  # type: ignore[misc]
        pass


def start_again(
    rank: int, data: str, saved: str, folder: str, cases: dict[str, list[Any]]
) -> dict[str, tuple[str, int]]:
    """For each set of flags what loading says, and the number of updates after one more."""
    from fairseq_moe.errors import CheckpointError

    _register()
    found = {}
    for index, (name, flags) in enumerate(cases.items()):
        save_dir = Path(folder) / str(index)
        if "--finetune-from-model" in flags:
            flags = [*flags, Path(saved) / "checkpoint_last.pt"]
            save_dir.mkdir()
        else:
            shutil.copytree(saved, save_dir)
        said, updates = "", -1
        try:
            run = RealRun(data, str(save_dir), 1, *flags)
            run.train(1)
            updates = run.trainer.get_num_updates()
        except CheckpointError as error:
            said = str(error)
        except Exception as error:
            said = f"a stack trace: {error!r}"
        found[name] = (said, updates)
    return found


def first_start(rank: int, data: str, save_dir: str, *flags: Any) -> None:
    """Three updates and a save, in the middle of an epoch."""
    run = RealRun(data, save_dir, 1, *flags)
    run.train(3)
    run.save()


@pytest.fixture(scope="module")
def saved(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(first_start, 1, str(text_data), str(folder))
    return folder


@pytest.fixture(scope="module")
def refused(
    saved: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, int]]:
    flags = {name: flags for name, (flags, _) in REFUSED.items()}
    folder = str(tmp_path_factory.mktemp("refused"))
    (found,) = run_ranks(start_again, 1, str(text_data), str(saved), folder, flags, timeout=100.0)
    return found


@pytest.fixture(scope="module")
def allowed(
    saved: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, int]]:
    folder = str(tmp_path_factory.mktemp("allowed"))
    (found,) = run_ranks(start_again, 1, str(text_data), str(saved), folder, ALLOWED, timeout=100.0)
    return found


@pytest.mark.parametrize("case", REFUSED)
def test_both_values_and_the_flag_that_allows_the_change_are_named(
    case: str, refused: dict[str, tuple[str, int]]
) -> None:
    said, updates = refused[case]
    for words in REFUSED[case][1]:
        assert words in said
    assert updates == -1


@pytest.mark.parametrize("case", ALLOWED)
def test_a_change_that_is_harmless_or_allowed_is_honoured(
    case: str, allowed: dict[str, tuple[str, int]]
) -> None:
    begins_afresh = "--reset-optimizer" in ALLOWED[case] or "--finetune-from-model" in ALLOWED[case]
    assert allowed[case] == ("", 1 if begins_afresh else 4)


def test_the_command_says_it_in_one_sentence_and_exits_with_2(text_data: Path, tmp_path: Path) -> None:
    first = train(text_data, tmp_path, "--max-update", 2, "--lr-scheduler", "fixed", world_size=1)
    assert first.exit_code == 0, first.output
    again = train(text_data, tmp_path, "--max-update", 4, world_size=1)  # inverse_sqrt: stock met a KeyError
    assert again.exit_code == 2
    (sentence,) = [line for line in again.output.splitlines() if line.startswith("fairseq_moe: error:")]
    assert "--lr-scheduler is fixed in the checkpoint and inverse_sqrt in this run" in sentence
    assert "--reset-lr-scheduler" in sentence
    assert "Traceback" not in again.output


def test_without_optimizer_state_schedule_and_update_count_go_on(text_data: Path, tmp_path: Path) -> None:
    flags = ["--no-save-optimizer-state", "--max-update"]
    assert train(text_data, tmp_path, *flags, 3, world_size=1).exit_code == 0
    again = train(text_data, tmp_path, *flags, 5, world_size=1)
    assert again.exit_code == 0, again.output
    assert "holds no optimizer state: training goes on from update 3" in again.output
    updates = json_lines(again, "train_inner")
    assert [line["num_updates"] for line in updates] == ["4", "5"]
    # inverse_sqrt with 4 updates of warm-up to 0.01: the rate that the next update takes is logged
    assert [float(line["lr"]) for line in updates] == pytest.approx([0.01, 0.01 * (4 / 5) ** 0.5], rel=1e-3)


def test_a_model_flag_that_differs_is_named_once_in_the_log(text_data: Path, tmp_path: Path) -> None:
    assert train(text_data, tmp_path, "--max-update", 1, world_size=1).exit_code == 0
    again = train(text_data, tmp_path, "--max-update", 2, "--dropout", 0.3, world_size=1)
    assert again.exit_code == 0, again.output
    assert (
        again.output.count("Flags of the model that differ from the checkpoint's: --dropout 0.1 -> 0.3") == 1
    )


@pytest.mark.parametrize("change", ["other words", "fewer words"])
def test_another_dictionary_is_refused(change: str, text_data: Path, tmp_path: Path) -> None:
    assert train(text_data, tmp_path / "run", "--max-update", 1, world_size=1).exit_code == 0
    other = tmp_path / "data"
    shutil.copytree(text_data, other)
    lines = (text_data / "dict.txt").read_text().splitlines(keepends=True)
    changed = [lines[1], lines[0], *lines[2:]] if change == "other words" else lines[:-1]
    (other / "dict.txt").write_text("".join(changed))
    again = train(other, tmp_path / "run", "--max-update", 2, world_size=1)
    assert again.exit_code == 2
    assert "token ids would mean other words" in again.output
    assert "Traceback" not in again.output


@pytest.fixture(scope="module")
def other_data(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The text under dictionaries that are not the checkpoint's."""
    found = {}
    lines = (text_data / "dict.txt").read_text().splitlines(keepends=True)
    for name, changed in {"other words": [lines[1], lines[0], *lines[2:]], "fewer words": lines[:-1]}.items():
        found[name] = tmp_path_factory.mktemp("data") / "data"
        shutil.copytree(text_data, found[name])
        (found[name] / "dict.txt").write_text("".join(changed))
    return found


COMMANDS = {
    "fairseq_cli.eval_lm": ["--gen-subset", "valid", "--batch-size", 2, "--tokens-per-sample", 32],
    "fairseq_cli.validate": ["--valid-subset", "valid", "--batch-size", 2],
    "fairseq_cli.generate": ["--gen-subset", "valid", "--batch-size", 2, "--max-len-b", 4],
    "fairseq_cli.interactive": ["--input", "prompts"],
}


@pytest.mark.parametrize("change", ["other words", "fewer words"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_another_dictionary(
    command: str, change: str, saved: Path, other_data: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("the value of the\n")
    argv = [other_data[change], "--user-dir", USER_DIR, "--cpu", "--task", "language_modeling"]
    argv += ["--path", saved / "checkpoint_last.pt", *COMMANDS[command]]
    result = run_cli(command, argv, cwd=tmp_path)
    assert result.exit_code == 2, result.output[-2000:]
    assert "token ids would mean other words" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"decoder_ffn_embed_dim": 64}, "has shape (32, 16) in the checkpoint and (64, 16) in this run"),
        ({"decoder_layers": 3}, "Missing key(s) in state_dict"),
    ],
)
def test_overrides_that_make_another_model_are_refused(
    overrides: dict[str, int], words: str, saved: Path, text_data: Path
) -> None:
    argv = [text_data, "--user-dir", USER_DIR, "--cpu", "--task", "language_modeling"]
    argv += ["--path", saved / "checkpoint_last.pt", *COMMANDS["fairseq_cli.eval_lm"]]
    result = run_cli("fairseq_cli.eval_lm", [*argv, "--model-overrides", repr(overrides)])
    assert result.exit_code == 2, result.output[-2000:]
    assert "does not fit this model" in result.output
    assert words in result.output
    assert "Traceback" not in result.output
