"""R8: a checkpoint of another model is refused with the flag and both values, and nothing of it is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.backends import AXES
from tests.helpers.ranks import run_ranks

CHANGES: dict[str, tuple[list[Any], str]] = {
    "experts": (["--moe-expert-count", 8], "--moe-expert-count is 4 in the checkpoint and 8 in this run"),
    "top-k": (["--moe-top1-expert"], "--moe-top1-expert is False in the checkpoint and True in this run"),
    "width": (["--decoder-embed-dim", 16], "--decoder-embed-dim is 8 in the checkpoint and 16 in this run"),
    "depth": (["--decoder-layers", 4], "--decoder-layers is 2 in the checkpoint and 4 in this run"),
    "expert width": (
        ["--moe-expert-ffn-dim", 20],
        "--moe-expert-ffn-dim is 12 in the checkpoint and 20 in this run",
    ),
    "places": (["--moe-freq", 1], "--moe-freq is 2 in the checkpoint and 1 in this run"),
    "heads": (
        ["--decoder-attention-heads", 4],
        "--decoder-attention-heads is 2 in the checkpoint and 4 in this run",
    ),
    "vocabulary": (["--dict-size", 60], "the dictionary has 48 words in the checkpoint and 64 in this run"),
    "no experts": (
        ["--moe-freq", 0, "--moe-expert-count", 0],
        "--moe-freq is 2 in the checkpoint and 0 in this run",
    ),
    "another router": (
        ["--moe-freq", 0, "--moe-expert-count", 0, "--num-experts", 4, "--moe-layer-freq", 2],
        "--moe-freq is 2 in the checkpoint and 0 in this run",
    ),
}


def load_with(
    rank: int, save_dir: str, changes: dict[str, list[Any]], layout: Sequence[str] = ()
) -> dict[str, tuple[str, bool]]:
    """For each change of flags what loading says, and whether the model is as it was."""
    from fairseq_moe.errors import CheckpointError
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *layout)
    run.train(1)
    run.save()
    found = {}
    for name, flags in changes.items():
        other = TinyRun(Path(save_dir), *flags, *layout)
        parameters = list(other.trainer.get_model().parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        said = "loaded"
        try:
            other.load()
        except CheckpointError as error:
            said = str(error)
        same = all(map(torch.equal, before, parameters)) and other.num_updates == 0
        found[name] = (said, same)
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bool]]:
    changes = {name: flags for name, (flags, _) in CHANGES.items()}
    (found,) = run_ranks(load_with, 1, str(tmp_path_factory.mktemp("saved")), changes)
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_both_values_are_named_and_nothing_is_loaded(change: str, said: dict[str, tuple[str, bool]]) -> None:
    sentence, is_untouched = said[change]
    assert CHANGES[change][1] in sentence
    assert "does not fit this model" in sentence
    assert is_untouched


@pytest.mark.parametrize("layout", AXES)
def test_ranks_that_share_micro_batches_refuse_the_same(layout: str, tmp_path: Path) -> None:
    names = ("experts", "width", "heads", "vocabulary", "another router")
    changes = {name: CHANGES[name][0] for name in names}
    for found in run_ranks(load_with, 2, str(tmp_path), changes, AXES[layout]):
        for name in names:
            sentence, is_untouched = found[name]
            assert CHANGES[name][1] in sentence
            assert is_untouched


def load_without_the_check(rank: int, save_dir: str) -> dict[str, tuple[str, bool]]:
    from fairseq_moe.stock.checkpoint import reading

    reading._check_fits = lambda *args, **kwargs: None
    return load_with(rank, save_dir, {"top-k": ["--moe-top1-expert"]})


def test_without_the_check_another_top_k_would_go_on_in_silence(tmp_path: Path) -> None:
    assert run_ranks(load_without_the_check, 1, str(tmp_path)) == [{"top-k": ("loaded", False)}]
