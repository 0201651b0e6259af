"""docs/convert.md at tiny size: from Hugging Face, train on two ranks, eval, generate, and back.

Of every kind of block one family; tests/distributed/test_axes_families.py trains all families and gives them back.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch

from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.convert.cli import main
from fairseq_moe.convert.verify import verify
from tests.e2e.commands import BASE, PLUGIN, json_lines
from tests.helpers.docs import documented_command
from tests.helpers.hf import import_transformers
from tests.helpers.ranks import run_cli

Models = Callable[..., Path]
VOCABULARY = 97
# Plain; latent attention, groups, a bias on sigmoid scores; a gated shared expert, dense layers; a norm over all heads,
# heads that turn in part; multipliers, a tied head, stacks; a bias on softmax scores; sinks, windows, biases, clamps.
FAMILIES = (
    "mixtral",
    "deepseek_v3",
    "qwen2_moe",
    "minimax_m2",
    "granitemoeshared",
    "ernie4_5_moe",
    "gpt_oss",
)
EOS, NUM_NEW = 2, 6
SENTENCE = "to be or not to be that is the question"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with words for the first ids and ids up to 96, ids 0 to 3 being ordinary words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*dict.fromkeys(SENTENCE.split())]
    vocabulary = {word: index for index, word in enumerate([words[0], "<s>", "</s>", *words[1:]])}
    vocabulary |= {f"word{index}": index for index in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _run(module: str, *argv: Any, world_size: int = 1) -> str:
    result = run_cli(module, argv, world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    return result.output


def _model_flags(model: Path) -> list[str]:
    lines = (model / "flags.txt").read_text().splitlines()
    return [part for line in lines for part in line.split(" ", 1)]


def _loss_and_continuation(directory: Path, items: list[int], num_new: int) -> tuple[float, list[int]]:
    """Of transformers' model: the mean loss of ``items`` in bits, and what it continues the first of them with."""
    model = import_transformers().AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = [EOS, *items]  # fairseq's blocks begin with the end of the one before
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(items)) / math.log(2)
        found = ids[:-1]
        for _ in range(num_new):
            found = [*found, int(model(torch.tensor([found])).logits[0, -1].argmax())]
    return float(loss), found


@dataclass(frozen=True)
class Run:
    """One family: the model, its data, and what it became in three updates on two ranks.

    Args:
        source: Hugging Face's directory.
        data: of preprocess.
        trained: the checkpoint.
        first_loss: of the first update, in bits.
        task: flags of the task.
        items: the text of the data.
    """

    source: Path
    data: Path
    trained: Path
    first_loss: float
    task: list[str]
    items: list[int]


def _train(source: Path, tokenizer: Path, folder: Path) -> Run:
    model, data = folder / "model", folder / "data"
    from_hf(source, model, expert_parallel_size=2)
    (folder / "text").write_text(f"{SENTENCE}\n")
    texts = [part for split in ("train", "valid") for part in (f"--{split}pref", str(folder / "text"))]
    command = ["preprocess", str(model), *texts, "--destdir", str(data), "--tokenizer", str(tokenizer)]
    assert main(command) == 0
    task = "--task language_modeling --tokens-per-sample 30 --sample-break-mode eos"
    training = "--criterion moe_cross_entropy --optimizer adam --lr 0.005 --max-epoch 3 --batch-size 1"
    restoring = (
        "--reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler --no-epoch-checkpoints"
    )
    files = ["--restore-file", model / "checkpoint.pt", "--save-dir", folder / "trained"]
    flags = [*PLUGIN, *BASE, *split(f"{task} {training} {restoring}"), *_model_flags(model), *files]
    result = run_cli("fairseq_cli.train", [data, *flags], world_size=2)
    assert result.exit_code == 0, result.output[-3000:]
    first = json_lines(result, "train_inner")[0]
    trained = folder / "trained" / "checkpoint_last.pt"
    return Run(
        source, data, trained, float(first["inner_loss"]), split(task), [*_ids(tokenizer, SENTENCE), EOS]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_model_is_trained_and_given_back(
    name: str, hf_model: Models, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _train(hf_model(name), tokenizer, tmp_path)
    done = to_hf(run.trained, tmp_path / "back")
    assert "are others than those of the model it came from" in done.notes[0]
    assert (tmp_path / "back" / "generation_config.json").is_file()
    assert "verified" in verify(tmp_path / "back", run.trained)
    monkeypatch.chdir(tmp_path)
    Path("TRAINED").symlink_to(run.trained.parent)
    assert main(documented_command("convert.md", "to-hf")) == 0

    before, _ = _loss_and_continuation(run.source, run.items, 0)
    after, continued = _loss_and_continuation(tmp_path / "back", run.items, NUM_NEW)
    assert run.first_loss == pytest.approx(before, abs=2e-3)
    assert after < before - 0.1
    reading = [run.data, *PLUGIN, "--cpu", *run.task, "--path", run.trained]
    score = _run("fairseq_cli.eval_lm", *reading, "--gen-subset", "valid")
    assert float(re.findall(r"Loss \(base 2\): ([\d.]+)", score)[0]) == pytest.approx(after, abs=2e-3)

    (tmp_path / "input").write_text(f"{SENTENCE}\n")
    text_flags = ["--bpe", "hf_tokenizers", "--hf-tokenizer-json", tokenizer]
    length = ["--beam", "1", "--max-len-b", len(run.items) - 1 + NUM_NEW]
    new = continued[1:]
    expected = new[: new.index(EOS)] if EOS in new else new
    whole = ["--prefix-size", len(run.items) - 1, "--required-batch-size-multiple", "1"]  # of one sentence
    inputs = {"interactive": ["--input", tmp_path / "input"], "generate": ["--gen-subset", "valid", *whole]}
    for command, of_it in inputs.items():
        output = _run(f"fairseq_cli.{command}", *reading, *of_it, *text_flags, *length)
        (text,) = re.findall(r"^D-0\t\S+\t(.*)$", output, flags=re.MULTILINE)
        assert _ids(tokenizer, text) == expected, command


def _ids(tokenizer: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    found: list[int] = Tokenizer.from_file(str(tokenizer)).encode(text).ids
    return found
