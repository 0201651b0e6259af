"""Further updates of the golden checkpoint, on two ranks of fairseq-train, log what the moe branch logged."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.modules.routing.stats import LAYER_STATS
from tests.helpers.checkpoints import assert_same, contents
from tests.helpers.ranks import run_cli
from tests.numerics.branch import CHECKPOINT, DATA, TRAIN_FLAGS, expected

PRECISE = ("loss", "inner_loss", "moe_gate_loss", "gnorm", "entropy_gating")
EXACT = ("wpb", "bsz", "num_updates", "lr")


def train(
    folder: Path, flags: list[Any], *, world_size: int = 2, is_saved: bool = False
) -> list[dict[str, Any]]:
    """One dictionary of numbers per update, as rank 0 logged them."""
    argv = [DATA, *TRAIN_FLAGS, "--restore-file", CHECKPOINT, "--save-dir", folder, *flags]
    argv = [flag for flag in argv if not (is_saved and flag == "--no-save")]
    result = run_cli("fairseq_cli.train", argv, world_size=world_size)
    assert result.exit_code == 0, result.output
    updates = []
    for line in result.outputs[0].splitlines():
        if "| INFO | train_inner |" in line:
            fields = json.loads(line.split("| INFO | train_inner |")[1])
            updates.append({key: float(value) for key, value in fields.items()})
    return updates


def assert_as_the_branch(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compare every update; see the README beside the branch's numbers for tolerances."""
    for update, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        for key in PRECISE:
            assert our[key] == pytest.approx(their[key], abs=2.5e-3), f"{key} of update {update}"
        for key in EXACT:
            assert our[key] == their[key], f"{key} of update {update}"
        for key in set(LAYER_STATS) & their.keys():
            assert our[key] == pytest.approx(their[key], abs=0.25), f"{key} of update {update}"


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
    assert_as_the_branch(train(tmp_path, [*flags, "--max-update", str(len(theirs))]), theirs)


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


STAGES = ("--pipeline-model-parallel-size", 2, "--update-freq", 2)
OF_STAGES = {
    "P2": (2, STAGES),
    "P2 V2": (2, (*STAGES, "--num-virtual-stages-per-pipeline-rank", 2)),
}
SGD = ("--optimizer", "sgd", "--lr", 0.5, "--momentum", 0.0)


@pytest.mark.parametrize("layout", OF_STAGES)
def test_stages_of_a_pipeline_update_as_the_branch_does(layout: str, tmp_path: Path) -> None:
    """A stage counts its capacity in a whole micro-batch, as a rank of the branch's did, so nothing else is dropped."""
    theirs = expected()["continuation_sgd"]
    world_size, flags = OF_STAGES[layout]
    ours = train(tmp_path, [*flags, *SGD, "--max-update", len(theirs)], world_size=world_size)
    assert_as_the_branch(ours, theirs)


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files, as ``read_and_update`` writes them."""
    return read_and_update(tmp_path_factory.mktemp("one process"), 1, ("--update-freq", 2))


def read_and_update(folder: Path, world_size: int, flags: tuple[Any, ...]) -> Path:
    """Write what a run has read, after an update at a rate of nothing, and the next update; each is an epoch."""
    own = ["--optimizer", "sgd", "--lr", "0,0.5", "--max-update", 2]
    assert len(train(folder, [*flags, *own], world_size=world_size, is_saved=True)) == 2
    return folder


@pytest.mark.parametrize("layout", OF_STAGES)
def test_stages_read_its_files_as_one_process_does(layout: str, by_one_process: Path, tmp_path: Path) -> None:
    read_and_update(tmp_path, *OF_STAGES[layout])
    with torch.serialization.safe_globals([Namespace]):  # in which stock saves the flags of SGD
        read, updated, read_alone, wanted = (
            contents(folder / f"checkpoint{epoch}.pt")
            for folder in (tmp_path, by_one_process)
            for epoch in (1, 2)
        )
    assert_same(read, read_alone)
    shared, *ranks = (
        torch.load(CHECKPOINT.with_name(f"checkpoint_last-{part}.pt"), weights_only=True)["model"]
        for part in ("shared", "rank-0", "rank-1")
    )
    for layer in (1, 3):  # with experts
        name = f"decoder.layers.{layer}.self_attn.k_proj.weight"
        assert torch.equal(read[f"model/{name}"], shared[name].float())
        prefix = f"decoder.layers.{layer}.moe_layer.experts"
        theirs = [rank[f"{prefix}.{expert}.fc1.weight"].float() for rank in ranks for expert in range(2)]
        assert torch.equal(read[f"model/{prefix}.fc1_weight"], torch.stack(theirs))
    assert updated.keys() == wanted.keys()
    assert sum(not torch.equal(wanted[name], read[name]) for name in wanted) > 40
    for name, tensor in wanted.items():
        torch.testing.assert_close(updated[name], tensor, rtol=1e-5, atol=1e-6)
