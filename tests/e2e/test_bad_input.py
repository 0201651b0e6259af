"""What cannot be honoured ends with one sentence per problem and exit code 2, before data is read."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, MOE, PLUGIN, eval_lm_argv, train_argv
from tests.e2e.processes import console_script, run_process, torchrun
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

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


_ENDS_BADLY = """
import atexit, os, threading, time
from fairseq_moe.errors import MoEError
from fairseq_moe.stock.start import ending

atexit.register(os.abort)  # as a destructor of a process group may, while another rank is connected
ending.world_size = lambda: 2
threading.Thread(target=lambda: (time.sleep(1), print("saved"))).start()
with ending.one_sentence_errors():
    raise MoEError("this is the sentence.")
"""


def test_no_destructor_changes_the_exit_code_of_a_rank(tmp_path: Path) -> None:
    result = run_process(sys.executable, "-c", _ENDS_BADLY, cwd=tmp_path)
    assert _sentences(result) == ["this is the sentence."]
    assert result.output.endswith("saved\n")  # as by a background save


def test_no_rank_leaves_while_another_still_connects(text_data: Path, moe_checkpoint: Path) -> None:
    flags = ("--tokens-per-sample", "48")
    argv = ["fairseq_cli.eval_lm", *eval_lm_argv(text_data, moe_checkpoint), *flags]
    result = run_cli("tests.e2e.starts", argv, world_size=2, function="late_rank_1")
    assert result.exit_codes == [2, 2]
    (sentence,) = _sentences(result)
    assert "32 positions" in sentence


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


# --- text that is not there ---


@pytest.fixture(scope="module")
def empty_splits(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fairseq-preprocess makes of a text for training and of empty files for valid and test."""
    folder = tmp_path_factory.mktemp("empty-splits")
    (folder / "text").write_text("the value of the object is the name of the class\n" * 100)
    (folder / "empty").write_text("")
    texts = ("--trainpref", folder / "text", "--validpref", folder / "empty", "--testpref", folder / "empty")
    shared = ("--srcdict", text_data / "dict.txt", "--workers", "1", "--destdir", folder / "bin")
    result = run_cli("fairseq_cli.preprocess", ["--only-source", *texts, *shared])
    assert result.exit_code == 0, result.output[-3000:]
    return folder / "bin"


@pytest.mark.parametrize("subset", ["--train-subset", "--valid-subset"])
def test_training_on_an_empty_text_names_its_file(subset: str, empty_splits: Path, tmp_path: Path) -> None:
    flags = (subset, "test", *(("--disable-validation",) if subset == "--train-subset" else ()))
    result = run_cli("fairseq_cli.train", train_argv(empty_splits, tmp_path, *flags))
    (sentence,) = _sentences(result)
    assert sentence.startswith(f"{empty_splits / 'test.bin'} is empty")


@pytest.mark.parametrize("command", ["eval_lm", "generate", "validate"])
def test_evaluation_of_an_empty_text_names_its_file(
    command: str, empty_splits: Path, moe_checkpoint: Path
) -> None:
    subset = ("--valid-subset" if command == "validate" else "--gen-subset", "test")
    argv = [*PLUGIN, "--cpu", "--path", moe_checkpoint, "--task", "language_modeling", "--batch-size", "1"]
    result = run_cli(f"fairseq_cli.{command}", [empty_splits, *argv, *subset])
    (sentence,) = _sentences(result)
    assert sentence.startswith(f"{empty_splits / 'test.bin'} is empty")


def test_a_split_that_is_not_there_is_named(text_data: Path, tmp_path: Path) -> None:
    argv = train_argv(text_data, tmp_path, "--valid-subset", "tset")
    (sentence,) = _sentences(run_cli("fairseq_cli.train", argv))
    assert "'tset'" in sentence and f"{text_data / 'tset'}.idx" in sentence


def test_a_text_too_short_for_one_batch_is_told_from_an_empty_one(text_data: Path, tmp_path: Path) -> None:
    argv = train_argv(text_data, tmp_path, "--required-batch-size-multiple", "1000", "--batch-size", "1000")
    (sentence,) = _sentences(run_cli("fairseq_cli.train", argv))
    assert "--required-batch-size-multiple" in sentence
    num_blocks = re.search(r"a split with (\d+) samples", sentence)
    assert num_blocks is not None and int(num_blocks[1]) > 0


def _load_what_is_not_there(rank: int, folder: str, split: str) -> list[str]:
    """Names of the classes of the error that a program meets, of which stock raises one."""
    from fairseq import tasks
    from fairseq.tasks.language_modeling import LanguageModelingConfig
    from omegaconf import OmegaConf

    import fairseq_moe  # noqa: F401

    # Without the fields that stand for flags of other groups.
    defaults = {
        name: value for name, value in vars(LanguageModelingConfig()).items() if "$" not in str(value)
    }
    others = {"dataset_impl": None, "seed": 1, "use_plasma_view": False}

    settings = OmegaConf.create({**defaults, **others, "_name": "language_modeling", "data": folder})
    task = tasks.setup_task(settings)
    try:
        task.load_dataset(split)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__]
    return []


@pytest.mark.parametrize(("split", "kind"), [("tset", "FileNotFoundError"), ("test", "ValueError")])
def test_programs_catch_the_error_that_stock_raises(split: str, kind: str, empty_splits: Path) -> None:
    [kinds] = run_ranks(_load_what_is_not_there, 1, str(empty_splits), split)
    assert kind in kinds and "MoEError" in kinds


# --- models that have none of our flags ---


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("transformer", "an encoder-decoder model"),
        ("transformer_iwslt_de_en", "an encoder-decoder model"),
        ("lightconv_lm", "lightconv_lm is none of them"),
    ],
)
def test_expert_flags_of_another_model_are_refused(arch: str, kind: str, tmp_path: Path) -> None:
    flags = ("--arch", arch, "--moe-freq", "2", "--moe-expert-count=4", "--gated-ffn")
    result = run_cli("fairseq_cli.train", [tmp_path / "no data", *PLUGIN, "--cpu", *flags])
    (sentence,) = _sentences(result)
    assert sentence.startswith(
        "--moe-freq, --moe-expert-count, --gated-ffn can be given to the transformer_lm"
    )
    assert kind in sentence
    assert "usage:" not in result.output


def test_expert_flags_without_an_architecture_are_refused(tmp_path: Path) -> None:
    result = run_cli("fairseq_cli.train", [tmp_path / "no data", *PLUGIN, "--cpu", "--moe-freq", "2"])
    (sentence,) = _sentences(result)
    assert "--arch is not given" in sentence


def test_a_flag_that_nobody_knows_is_still_the_parsers_business(tmp_path: Path) -> None:
    argv = [tmp_path / "no data", *PLUGIN, "--cpu", "--arch", "transformer", "--moe-frequency", "2"]
    result = run_cli("fairseq_cli.train", argv)
    assert result.exit_code == 2
    assert "unrecognized arguments: --moe-frequency 2" in result.output
