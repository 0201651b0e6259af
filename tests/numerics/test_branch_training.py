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
