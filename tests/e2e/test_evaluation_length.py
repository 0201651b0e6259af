"""Blocks longer than the model's positions: cut to fit, refused, or left out with their number said; never in silence.

The model of ``moe_checkpoint`` has 32 positions, the text of ``text_data``'s valid split 525 tokens.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, PLUGIN, json_lines, perplexity, train
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

_TOKENS = {
    "short": [10, 30, 5],
    "long": [40, 50],
    "mixed": [10, 40, 20, 33, 30],
}  # of each sentence, its end included


@pytest.fixture(scope="module")
def sentences(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dictionary of ``text_data`` with splits of the sentences of ``_TOKENS``."""
    folder = tmp_path_factory.mktemp("sentences")
    (folder / "dict.txt").write_text((text_data / "dict.txt").read_text())
    run_ranks(_write_sentences, 1, str(folder))
    return folder


def _write_sentences(rank: int, folder: str) -> None:
    import torch
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary.load(f"{folder}/dict.txt")
    for split, sizes in _TOKENS.items():
        builder = indexed_dataset.make_builder(
            f"{folder}/{split}.bin", impl="mmap", vocab_size=len(dictionary)
        )
        for index, size in enumerate(sizes):
            words = [4 + (7 * index + word) % 100 for word in range(size - 1)]
            builder.add_item(torch.tensor([*words, dictionary.eos()]))
        builder.finalize(f"{folder}/{split}.idx")


def _eval_lm(data: Path, checkpoint: Path, *flags: Any, world_size: int = 1) -> CommandResult:
    argv = [data, *PLUGIN, "--cpu", "--num-workers", "0", "--path", checkpoint, "--task", "language_modeling"]
    subset = () if "--gen-subset" in flags else ("--gen-subset", "valid")
    return run_cli(
        "fairseq_cli.eval_lm", [*argv, "--batch-size", "1", *subset, *flags], world_size=world_size
    )


def _validate(data: Path, checkpoint: Path, *flags: Any, world_size: int = 1) -> CommandResult:
    argv = [data, *PLUGIN, "--cpu", "--num-workers", "0", "--path", checkpoint, "--task", "language_modeling"]
    argv += ["--batch-size", "1", "--required-batch-size-multiple", "1", "--log-format", "json"]
    subset = () if "--valid-subset" in flags else ("--valid-subset", "valid")
    return run_cli("fairseq_cli.validate", [*argv, *subset, *flags], world_size=world_size)


COMMANDS = {"eval_lm": (_eval_lm, "--gen-subset"), "validate": (_validate, "--valid-subset")}


def _refusal(result: CommandResult) -> str:
    """The one sentence of a run that printed no number."""
    assert result.exit_code == 2, result.output[-3000:]
    assert "Traceback" not in result.output
    assert "Perplexity" not in result.output and '"valid_loss"' not in result.output
    (sentence,) = re.findall(r"^fairseq_moe: error: (.*\.)$", result.output, flags=re.MULTILINE)
    return str(sentence)


@pytest.mark.parametrize("world_size", [1, 2])
def test_length_that_is_not_given_is_what_the_model_has_positions_for(
    world_size: int, text_data: Path, moe_checkpoint: Path
) -> None:
    found = _eval_lm(text_data, moe_checkpoint, world_size=world_size)
    fitting = _eval_lm(text_data, moe_checkpoint, "--tokens-per-sample", "32")
    assert found.exit_code == 0, found.output[-3000:]
    assert perplexity(found) == perplexity(fitting)
    assert "Evaluated 525 tokens" in found.outputs[0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("length", ["48", "1024"])  # the second is stock's default, given all the same
@pytest.mark.parametrize("command", COMMANDS)
def test_given_length_that_does_not_fit_is_refused(
    command: str, length: str, world_size: int, text_data: Path, moe_checkpoint: Path
) -> None:
    run, _ = COMMANDS[command]
    sentence = _refusal(run(text_data, moe_checkpoint, "--tokens-per-sample", length, world_size=world_size))
    assert f"--tokens-per-sample is {length}" in sentence and "32 positions" in sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_length_in_the_overrides_counts_as_given(command: str, text_data: Path, moe_checkpoint: Path) -> None:
    run, _ = COMMANDS[command]
    refused = run(text_data, moe_checkpoint, "--model-overrides", "{'tokens_per_sample': 48}")
    assert "--tokens-per-sample is 48" in _refusal(refused)
    overridden, given = (
        run(text_data, moe_checkpoint, *flags)
        for flags in (("--model-overrides", "{'tokens_per_sample': 16}"), ("--tokens-per-sample", "16"))
    )
    assert _number(overridden) == _number(given) != _number(run(text_data, moe_checkpoint))


def _number(result: CommandResult) -> float:
    """What was printed, whichever command it was."""
    assert result.exit_code == 0, result.output[-3000:]
    if "Perplexity" in result.outputs[0]:
        return perplexity(result)
    (record,) = json_lines(result, "valid")
    return float(record["valid_loss"])


@pytest.mark.parametrize("command", COMMANDS)
def test_sentences_that_are_too_long_are_not_left_out_in_silence(
    command: str, sentences: Path, moe_checkpoint: Path
) -> None:
    run, subset = COMMANDS[command]
    flags = ("--sample-break-mode", "eos", subset)
    sentence = _refusal(run(sentences, moe_checkpoint, *flags, "mixed"))
    assert "73 of 133 tokens" in sentence and "32 positions" in sentence and "longest has 40" in sentence
    assert "--skip-invalid-size-inputs-valid-test" in sentence
    # What fits has a number, whatever length is given: it cuts nothing here.
    assert run(sentences, moe_checkpoint, *flags, "short", "--tokens-per-sample", "48").exit_code == 0


def test_sentences_keep_the_number_that_they_had(text_data: Path, moe_checkpoint: Path) -> None:
    """All are padded to the length, and capacities are a share of the padded batch, as in the branch."""
    unset, default, short = (
        _eval_lm(text_data, moe_checkpoint, "--sample-break-mode", "eos", *flags)
        for flags in ((), ("--tokens-per-sample", "1024"), ("--tokens-per-sample", "32"))
    )
    assert _number(unset) == _number(default) != _number(short)


@pytest.mark.parametrize("world_size", [1, 2])
def test_left_out_on_demand_is_said_in_the_printed_line(
    world_size: int, sentences: Path, moe_checkpoint: Path
) -> None:
    flags = ("--sample-break-mode", "eos", "--skip-invalid-size-inputs-valid-test")
    scored = _eval_lm(sentences, moe_checkpoint, *flags, "--gen-subset", "mixed", world_size=world_size)
    assert scored.exit_code == 0, scored.output[-3000:]
    assert len(re.findall(r"Evaluated ", scored.outputs[0])) == 1
    assert "Evaluated 60 of 133 tokens" in scored.outputs[0]
    with_first = _eval_lm(sentences, moe_checkpoint, *flags, "--gen-subset", "mixed", "--add-bos-token")
    assert "Evaluated 63 of 138 tokens" in with_first.outputs[0]
    valid = _validate(sentences, moe_checkpoint, *flags, "--valid-subset", "mixed", world_size=world_size)
    assert valid.exit_code == 0, valid.output[-3000:]
    (record,) = json_lines(valid, "mixed")
    assert record["mixed_scored_tokens"] == "60 of 133"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_scored_is_an_error(
    command: str, world_size: int, sentences: Path, moe_checkpoint: Path
) -> None:
    run, subset = COMMANDS[command]
    flags = ("--sample-break-mode", "eos", "--skip-invalid-size-inputs-valid-test", subset, "long")
    assert "0 of 90 tokens" in _refusal(run(sentences, moe_checkpoint, *flags, world_size=world_size))


def test_dense_model_keeps_stocks_number_and_says_what_is_left_out(
    text_data: Path, sentences: Path, tmp_path: Path
) -> None:
    train(text_data, tmp_path, "--disable-validation", model=DENSE)
    checkpoint = tmp_path / "checkpoint_last.pt"
    nothing = _eval_lm(text_data, checkpoint)
    assert nothing.exit_code == 0 and perplexity(nothing) == 1.0
    assert "525 of 525 tokens stand in blocks longer than the model's 32 positions" in nothing.output
    part = _eval_lm(sentences, checkpoint, "--sample-break-mode", "eos", "--gen-subset", "mixed")
    assert "73 of 133 tokens stand in blocks" in part.output and "Evaluated 60 tokens" in part.output
    whole = _eval_lm(text_data, checkpoint, "--tokens-per-sample", "32")
    assert "stand in blocks" not in whole.output


def test_context_window_is_part_of_the_length(text_data: Path, moe_checkpoint: Path) -> None:
    found, given = (
        _eval_lm(text_data, moe_checkpoint, "--context-window", "8", *flags)
        for flags in ((), ("--tokens-per-sample", "32"))
    )
    assert found.exit_code == 0, found.output[-3000:]
    assert perplexity(found) == perplexity(given)
    sentence = _refusal(_eval_lm(text_data, moe_checkpoint, "--context-window", "32"))
    assert "--context-window is 32" in sentence


def test_missing_split_is_one_sentence(text_data: Path, moe_checkpoint: Path) -> None:
    for run, subset in COMMANDS.values():
        sentence = _refusal(run(text_data, moe_checkpoint, subset, "nothing"))
        assert str(text_data / "nothing") in sentence and "preprocess" in sentence
