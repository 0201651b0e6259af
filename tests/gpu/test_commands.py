"""Commands of fairseq on a GPU: the branch's checkpoint is evaluated, trained and resumed; NCCL with 1 and 2 ranks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import REPOSITORY
from tests.numerics.branch import CHECKPOINT, DATA, EVAL_FLAGS, TRAIN_FLAGS, expected

ADAM = ["--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--lr", "0.002"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


ON_ONE_RANK = ["--update-freq", 2]  # the two batches that the branch's two ranks had, one after the other
SGD = ["--optimizer", "sgd", "--lr", 0.5, "--momentum", 0.0]
# Updates that are compared: a near tie that falls otherwise on a device shows in later ones.
NUM_COMPARED = 6


def on_device(flags: list[Any], device: torch.device) -> list[str]:
    return [str(flag) for flag in flags if flag != "--cpu" or device.type == "cpu"]


def run(module: str, argv: list[Any], *, ranks: int | None = None) -> str:
    start = [sys.executable] if ranks is None else [*LAUNCH, str(ranks)]
    # By itself fairseq starts a rank for each device.
    alone = ["--distributed-world-size", "1"] if ranks is None else []
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*start, "-m", module, *map(str, argv), *alone],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def updates_of(output: str) -> list[dict[str, float]]:
    lines = [line for line in output.splitlines() if "| INFO | train_inner |" in line]
    records = [json.loads(line.split("| INFO | train_inner |")[1]) for line in lines]
    return [{key: float(value) for key, value in record.items()} for record in records]


def train(
    folder: Path, device: torch.device, flags: list[Any], *, ranks: int | None = None
) -> list[dict[str, float]]:
    """Train on from the branch's checkpoint."""
    saving = [flag for flag in on_device(TRAIN_FLAGS, device) if flag != "--no-save"]
    argv = [DATA, *saving, "--restore-file", CHECKPOINT, "--save-dir", folder, *flags]
    return updates_of(run("fairseq_cli.train", argv, ranks=ranks))


def assert_as_the_branch(name: str, ours: list[dict[str, float]]) -> None:
    theirs = expected()[name][:NUM_COMPARED]
    assert len(ours) == len(theirs)
    for update, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        for key in ("loss", "inner_loss", "moe_gate_loss", "gnorm", "entropy_gating"):
            assert our[key] == pytest.approx(their[key], abs=5e-3), f"{key} of update {update}"


def test_the_branchs_checkpoint_has_its_perplexity(device: torch.device) -> None:
    output = run("fairseq_cli.eval_lm", [DATA, "--path", CHECKPOINT, *on_device(EVAL_FLAGS, device)])
    found = re.search(r"Perplexity: ([\d.]+)", output)
    assert found is not None and float(found[1]) == pytest.approx(296.11, abs=0.021)
    assert expected()["eval"]["ppl"] == 296.11


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "flags"), [("continuation", ADAM), ("continuation_sgd", SGD)], ids=["adam", "sgd"]
)
def test_every_update_equals_the_branch(
    name: str, flags: list[Any], tmp_path: Path, device: torch.device
) -> None:
    ours = train(tmp_path, device, [*flags, *ON_ONE_RANK, "--max-update", NUM_COMPARED])
    assert_as_the_branch(name, ours)


@pytest.mark.timeout(400)
def test_one_rank_trains_saves_and_resumes(tmp_path: Path, device: torch.device) -> None:
    # Short blocks, so that the second update is not the last one of an epoch: there stock draws another order.
    short = ["--tokens-per-sample", 64]
    saving = [*short, "--max-update", 4, "--save-interval-updates", 2]
    whole = train(tmp_path / "whole", device, [*ADAM, *saving])
    assert len(whole) == 4 and all(0 < update["loss"] < 20 for update in whole)
    flags = [flag for flag in on_device(TRAIN_FLAGS, device) if not flag.startswith(("--reset", "--no-save"))]
    middle = ["--restore-file", tmp_path / "whole" / "checkpoint_1_2.pt", "--save-dir", tmp_path / "on"]
    output = run("fairseq_cli.train", [DATA, *flags, *short, *middle, *ADAM, "--max-update", 4])
    resumed = updates_of(output)
    assert [update["num_updates"] for update in resumed] == [3.0, 4.0]
    for on, uninterrupted in zip(resumed, whole[2:], strict=True):
        for key in ("loss", "gnorm"):
            assert on[key] == pytest.approx(uninterrupted[key], abs=2e-3)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_torchrun(ranks: int, tmp_path: Path, device: torch.device) -> None:
    """With NCCL between as many devices."""
    flags: list[Any] = [*ADAM, "--max-update", NUM_COMPARED, *(ON_ONE_RANK if ranks == 1 else [])]
    if device.type == "cpu":
        flags += ["--distributed-backend", "gloo"]
    elif torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many devices")
    assert_as_the_branch("continuation", train(tmp_path, device, flags, ranks=ranks))


@pytest.mark.timeout(400)
def test_a_pipeline_of_two_devices(tmp_path: Path, device: torch.device) -> None:
    """Two stages, two micro-batches: the order of transfers is all that NCCL goes by."""
    flags: list[Any] = [
        *ADAM,
        "--max-update",
        NUM_COMPARED,
        *ON_ONE_RANK,
        "--pipeline-model-parallel-size",
        2,
    ]
    if device.type == "cpu":
        flags += ["--distributed-backend", "gloo"]
    elif torch.cuda.device_count() < 2:
        pytest.skip("2 stages need as many devices")
    assert_as_the_branch("continuation", train(tmp_path, device, flags, ranks=2))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "flags",
    [
        ["--memory-efficient-fp16", "--fp16-adam-stats"],
        ["--bf16"],
        ["--memory-efficient-bf16", "--clip-norm", "1.0"],
        ["--ddp-backend", "fully_sharded", "--memory-efficient-fp16", "--fp16-adam-stats"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_precisions_learn_as_float32(flags: list[str], tmp_path: Path, device: torch.device) -> None:
    plain = train(tmp_path / "plain", device, [*ADAM, "--max-update", 8])
    found = train(tmp_path / "other", device, [*ADAM, "--max-update", 8, *flags])
    losses = [update["loss"] for update in found if "loss" in update]
    assert losses[-1] == pytest.approx(plain[-1]["loss"], rel=0.03)
