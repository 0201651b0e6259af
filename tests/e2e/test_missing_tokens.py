"""Converted models whose config.json names no beginning or end token: one sentence where one is needed.

Run with ``pytest tests/e2e/test_missing_tokens.py``.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_moe.convert import from_hf
from fairseq_moe.errors import MoEError
from tests.helpers.ranks import USER_DIR, run_cli

Models = Callable[..., Path]
NO_BEGINNING = "dict.txt names no beginning token; leave out --add-bos-token."
NO_END = "dict.txt names no end token"


@pytest.fixture(scope="module")
def converted(hf_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Convert a tiny Mixtral whose config.json has these tokens; binarised data lies beside it."""

    def convert(**tokens: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        shutil.copytree(hf_model("mixtral"), folder / "hf")
        config = json.loads((folder / "hf" / "config.json").read_text()) | tokens
        (folder / "hf" / "config.json").write_text(json.dumps(config))
        done = from_hf(folder / "hf", folder / "ours")
        (folder / "notes").write_text("\n".join(done.notes))
        (folder / "ours" / "prompts").write_text("5 6 7\n")
        return folder / "ours"

    return convert


COMMANDS: dict[str, list[Any]] = {
    "fairseq_cli.interactive": ["--input", "prompts", "--beam", 1, "--max-len-b", 8],
    "fairseq_cli.eval_lm": ["--gen-subset", "valid", "--batch-size", 2],
    "fairseq_cli.generate": ["--gen-subset", "valid", "--batch-size", 2, "--beam", 1],
    "fairseq_cli.validate": ["--valid-subset", "valid", "--batch-size", 2],
}


@pytest.mark.parametrize("command", [*COMMANDS, "fairseq_cli.train"])
def test_a_beginning_token_that_is_not_there_is_refused(command: str, converted: Callable[..., Path]) -> None:
    model = converted(bos_token_id=None)
    argv: list[Any] = [
        model,
        "--user-dir",
        USER_DIR,
        "--cpu",
        "--task",
        "language_modeling",
        "--add-bos-token",
    ]
    if command == "fairseq_cli.train":
        argv += ["--arch", "transformer_lm", "--num-experts", 4, "--criterion", "moe_cross_entropy"]
        argv += ["--batch-size", 2, "--optimizer", "adam", "--save-dir", model / "run"]
    else:
        argv += ["--path", model / "checkpoint.pt", *COMMANDS[command]]
    result = run_cli(command, argv, cwd=model)
    assert result.exit_code == 2, result.output[-2000:]
    assert NO_BEGINNING in result.output
    assert "Traceback" not in result.output


def test_a_program_that_loads_the_model_hears_it_too(converted: Callable[..., Path]) -> None:
    model = str(converted(bos_token_id=None))
    TransformerLanguageModel.from_pretrained(model, "checkpoint.pt", model)
    with pytest.raises(MoEError) as caught:
        TransformerLanguageModel.from_pretrained(model, "checkpoint.pt", model, add_bos_token=True)
    assert NO_BEGINNING in str(caught.value)


@pytest.mark.parametrize("token", [None, 97, [], "no"], ids=str)
def test_an_end_token_that_is_not_there_is_noted_and_refused_by_generation(
    token: Any, converted: Callable[..., Path]
) -> None:
    model = converted(eos_token_id=token)
    (note,) = (model.parent / "notes").read_text().splitlines()
    assert "generation needs an end token; put its id into dict.txt" in note
    argv = [
        model,
        "--user-dir",
        USER_DIR,
        "--cpu",
        "--task",
        "language_modeling",
        "--path",
        model / "checkpoint.pt",
    ]
    result = run_cli("fairseq_cli.interactive", [*argv, *COMMANDS["fairseq_cli.interactive"]], cwd=model)
    assert result.exit_code == 2, result.output[-2000:]
    assert NO_END in result.output
    assert "Traceback" not in result.output

    dictionary = model / "dict.txt"
    dictionary.write_text(dictionary.read_text().replace("eos=-", "eos=2"))
    result = run_cli("fairseq_cli.interactive", [*argv, *COMMANDS["fairseq_cli.interactive"]], cwd=model)
    assert result.exit_code == 0, result.output[-2000:]
    assert "H-0" in result.output
