"""A prompt that is too long is refused by itself and the next one is answered; generate obeys stock's flag."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import PLUGIN
from tests.helpers.ranks import CommandResult, run_cli

_MULTIPLE = ("--required-batch-size-multiple", "1")  # stock leaves out batches that are no multiple
_PROMPTS = ["the value", "of the " * 40, "the type", "a " * 32, "of the object"]  # the model has 32 positions


def _interactive(data: Path, checkpoint: Path, folder: Path, *flags: Any) -> CommandResult:
    (folder / "input.txt").write_text("".join(f"{prompt.strip()}\n" for prompt in _PROMPTS))
    argv = [data, *PLUGIN, "--cpu", "--path", checkpoint, "--task", "language_modeling"]
    argv += ["--input", folder / "input.txt", "--max-len-b", "10", "--beam", "1"]
    return run_cli("fairseq_cli.interactive", [*argv, *flags])


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--buffer-size", "2", "--batch-size", "2"),
        ("--buffer-size", "5", "--batch-size", "4"),
        ("--skip-invalid-size-inputs-valid-test",),
    ],
    ids=["one-by-one", "buffer-2", "buffer-5", "skip"],
)
def test_long_prompts_are_refused_and_the_others_answered(
    flags: tuple[str, ...], text_data: Path, moe_checkpoint: Path, tmp_path: Path
) -> None:
    result = _interactive(text_data, moe_checkpoint, tmp_path, *flags)
    assert result.exit_code == 0, result.output[-3000:]
    assert re.findall(r"^S-(\d+)\t", result.output, flags=re.MULTILINE) == ["0", "2", "4"]
    refused = re.findall(
        r"^fairseq_moe: error: prompt (\d+) has (\d+) tokens.* (\d+) positions", result.output, re.M
    )
    assert refused == [("1", "81", "32"), ("3", "33", "32")]
    assert result.output.index("error: prompt 1") < result.output.index("S-2\t")


def _generate(data: Path, checkpoint: Path, *flags: Any) -> CommandResult:
    argv = [data, *PLUGIN, "--cpu", "--num-workers", "0", "--path", checkpoint, "--task", "language_modeling"]
    argv += ["--tokens-per-sample", "34", "--gen-subset", "valid", "--batch-size", "1", "--max-len-b", "12"]
    return run_cli("fairseq_cli.generate", [*argv, "--prefix-size", "3", "--beam", "1", *_MULTIPLE, *flags])


def test_generate_refuses_long_samples_with_a_sentence_or_leaves_them_out_on_demand(
    text_data: Path, moe_checkpoint: Path
) -> None:
    refused = _generate(text_data, moe_checkpoint)
    assert refused.exit_code == 2 and "Traceback" not in refused.output, refused.output[-3000:]
    (sentence,) = re.findall(r"^fairseq_moe: error: (.*\.)$", refused.output, flags=re.MULTILINE)
    assert re.match(r"sample \d+ has 34 tokens, and the model has 32 positions", sentence)
    assert "--skip-invalid-size-inputs-valid-test" in sentence
    some = _generate(text_data, moe_checkpoint, "--skip-invalid-size-inputs-valid-test")
    assert some.exit_code == 0, some.output[-3000:]
    assert re.findall(r"^H-(\d+)\t", some.output, flags=re.MULTILINE) == [
        "15"
    ]  # the last, of 525 - 15 * 34 tokens
    none = _generate(
        text_data, moe_checkpoint, "--skip-invalid-size-inputs-valid-test", "--tokens-per-sample", "35"
    )
    assert none.exit_code == 2 and "has 35 tokens" in none.output  # 525 = 15 * 35: nothing is left to answer
