"""Further updates of the golden checkpoint, on two ranks of fairseq-train, log what the moe branch logged."""

import json
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.modules.routing.stats import LAYER_STATS
from tests.helpers.ranks import run_cli
from tests.numerics.branch import CHECKPOINT, DATA, TRAIN_FLAGS, expected

PRECISE = ("loss", "inner_loss", "moe_gate_loss", "gnorm", "entropy_gating")
EXACT = ("wpb", "bsz", "num_updates", "lr")


def train(folder: Path, flags: list[str], *, world_size: int = 2) -> list[dict[str, Any]]:
    """One dictionary of numbers per update, as rank 0 logged them."""
    argv = [DATA, *TRAIN_FLAGS, "--restore-file", CHECKPOINT, "--save-dir", folder, *flags]
    result = run_cli("fairseq_cli.train", argv, world_size=world_size)
    assert result.exit_code == 0, result.output
    updates = []
    for line in result.outputs[0].splitlines():
        if "| INFO | train_inner |" in line:
            fields = json.loads(line.split("| INFO | train_inner |")[1])
            updates.append({key: float(value) for key, value in fields.items()})
    return updates


def test_fine_tuning_from_any_of_its_files_leaves_the_place_in_its_data_behind(tmp_path: Path) -> None:
    """Named by the file of a rank, and with another batch size, which a run that goes on could not have."""
    flags = [flag for flag in TRAIN_FLAGS if not str(flag).startswith("--reset-")]
    flags[flags.index("--batch-size") + 1] = "2"
    rank_file = CHECKPOINT.with_name("checkpoint_last-rank-0.pt")
    argv = [DATA, *flags, "--finetune-from-model", rank_file, "--save-dir", tmp_path, "--max-update", "1"]
    result = run_cli("fairseq_cli.train", [*argv, "--optimizer", "sgd", "--lr", 0.5])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("continuation", ["--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--lr", 0.002]),
        (
            "continuation",
            ["--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--lr", 0.002, "--fp16-adam-stats"],
        ),
        ("continuation_sgd", ["--optimizer", "sgd", "--lr", 0.5, "--momentum", 0.0]),
    ],
    ids=["adam", "adam-fp16-stats", "sgd"],
)
def test_every_update_equals_the_branch(name: str, flags: list[str], tmp_path: Path) -> None:
    theirs = expected()[name]
    ours = train(tmp_path, [*flags, "--max-update", str(len(theirs))])
    assert len(ours) == len(theirs)
    for update, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        for key in PRECISE:
            assert our[key] == pytest.approx(their[key], abs=2.5e-3), f"{key} of update {update}"
        for key in EXACT:
            assert our[key] == their[key], f"{key} of update {update}"
        for key in set(LAYER_STATS) & their.keys():
            assert our[key] == pytest.approx(their[key], abs=0.25), f"{key} of update {update}"


def test_fully_sharded_begins_from_the_same_weights(tmp_path: Path) -> None:
    """The files hold a table of positions that the wrapper does not know."""
    theirs = expected()["continuation"][0]
    flags = ["--ddp-backend", "fully_sharded", "--optimizer", "sgd", "--lr", 0.5, "--max-update", 1]
    (first,) = train(tmp_path, flags)
    for key in ("loss", "inner_loss", "moe_gate_loss"):
        assert first[key] == pytest.approx(theirs[key], abs=2.5e-3)


@pytest.mark.parametrize(
    "flags",
    [("--tensor-model-parallel-size", 2, "--sequence-parallel"), ("--context-parallel-size", 2)],
    ids=["tensor", "context"],
)
def test_ranks_that_share_micro_batches_begin_from_the_same_weights(
    flags: tuple[Any, ...], tmp_path: Path
) -> None:
    """Capacity is counted on each rank, so that other tokens are dropped, and digits differ after the second."""
    theirs = expected()["continuation"][0]
    own = ["--update-freq", 2, "--optimizer", "sgd", "--lr", 0.5, "--max-update", 1]
    (first,) = train(tmp_path, [*flags, *own])
    for key in ("loss", "inner_loss", "moe_gate_loss"):
        assert first[key] == pytest.approx(theirs[key], abs=5e-3)
