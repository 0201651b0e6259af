"""Whether padding is routed: the default of each kind of gates, what a resumed run keeps, and what is said."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.commands import DENSE, EXPERTS, MOE, json_lines, train
from tests.helpers.ranks import CommandResult, run_ranks

_TOP_K = [*DENSE, "--num-experts", "4", "--moe-layer-freq", "2", "--moe-aux-loss-coeff", "0.01"]
_TOP_K += ["--criterion", "moe_cross_entropy"]
_PADDED = ("--sample-break-mode", "eos", "--disable-validation")


def _train(data: Path, folder: Path, *flags: Any, model: list[str] = _TOP_K, **kwargs: Any) -> CommandResult:
    return train(data, folder, *_PADDED, *flags, model=model, **kwargs)


def _stored(folder: Path) -> Any:
    state = torch.load(folder / "checkpoint_last.pt", weights_only=False)
    return state["cfg"]["model"]["use_moe_pad_mask"]


def _said(result: CommandResult) -> list[str]:
    return re.findall(r"\| (--use-moe-pad-mask .*)$", result.output, flags=re.MULTILINE)


def _losses(result: CommandResult) -> list[tuple[str, str]]:
    return [(record["loss"], record["moe_aux_loss"]) for record in json_lines(result, "train_inner")]


@pytest.fixture(scope="module")
def padded_data(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text_data`` with training sentences of very different lengths."""
    folder = tmp_path_factory.mktemp("padded")
    (folder / "dict.txt").write_text((text_data / "dict.txt").read_text())
    run_ranks(_write, 1, str(folder))
    return folder


def _write(rank: int, folder: str) -> None:
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary.load(f"{folder}/dict.txt")
    generator = torch.Generator().manual_seed(0)
    builder = indexed_dataset.make_builder(f"{folder}/train.bin", impl="mmap", vocab_size=len(dictionary))
    for index in range(48):
        words = torch.randint(4, 150, (5 + 7 * index % 27,), generator=generator)
        builder.add_item(torch.cat([words, torch.tensor([dictionary.eos()])]))
    builder.finalize(f"{folder}/train.idx")


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_run_keeps_what_it_was_trained_with_and_says_so(
    world_size: int, padded_data: Path, tmp_path: Path
) -> None:
    whole = _train(
        padded_data,
        tmp_path / "whole",
        "--use-moe-pad-mask",
        "false",
        "--max-update",
        "6",
        world_size=world_size,
    )
    first = ("--max-update", "2", "--use-moe-pad-mask", "false")
    _train(padded_data, tmp_path / "parts", *first, world_size=world_size)
    assert _stored(tmp_path / "parts") is False  # as the default of earlier versions is stored
    for updates in (4, 6):  # the second time from what the first has stored
        rest = _train(padded_data, tmp_path / "parts", "--max-update", updates, world_size=world_size)
        (sentence,) = _said(rest)
        assert "stays false" in sentence and "default would be true" in sentence
        assert "--use-moe-pad-mask False ->" not in rest.output
        assert _stored(tmp_path / "parts") is False
        assert _losses(rest) == _losses(whole)[updates - 2 : updates]
    masked = _train(padded_data, tmp_path / "masked", world_size=world_size)
    assert _losses(masked) != _losses(whole)[:4]  # it makes a difference at all
    assert _stored(tmp_path / "masked") is True and _said(masked) == []


def test_flag_that_is_given_wins_and_fine_tuning_begins_anew(padded_data: Path, tmp_path: Path) -> None:
    _train(padded_data, tmp_path / "old", "--max-update", "2", "--use-moe-pad-mask", "false")
    tuned = _train(
        padded_data, tmp_path / "new", "--finetune-from-model", tmp_path / "old" / "checkpoint_last.pt"
    )
    assert _said(tuned) == [] and _stored(tmp_path / "new") is True
    given = _train(padded_data, tmp_path / "old", "--use-moe-pad-mask")
    (sentence,) = _said(given)
    assert "true was given" in sentence and "with false" in sentence
    assert _stored(tmp_path / "old") is True


def test_gates_of_the_branch_route_padding_and_warn_once(padded_data: Path, tmp_path: Path) -> None:
    model = [*DENSE, *MOE]
    assert EXPERTS[0] in model
    unset = _train(padded_data, tmp_path / "unset", "--no-save", model=model)
    off = _train(padded_data, tmp_path / "off", "--no-save", "--use-moe-pad-mask", "false", model=model)
    on = _train(padded_data, tmp_path / "on", "--no-save", "--use-moe-pad-mask", model=model)
    assert [run.output.count("batches are padded") for run in (unset, off, on)] == [1, 0, 0]
    losses = [[record["loss"] for record in json_lines(run, "train_inner")] for run in (unset, off, on)]
    assert losses[0] == losses[1] != losses[2]
