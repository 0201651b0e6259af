"""R7 with ranks that share micro-batches: those of every axis continue what any others wrote, and the other way.

Run with ``pytest tests/reliability/test_r07_shared_batches.py``. Layouts of one number of ranks take turns within one
start: each must hold to the bit what the file of the one before says, and its updates are those of one process.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.checkpoints import contents
from tests.helpers.ranks import run_ranks
from tests.helpers.real_runs import RealRun

TENSOR = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
CONTEXT = ("--context-parallel-size", 2)
PIPELINE = ("--pipeline-model-parallel-size", 2)
# Two experts of which each token visits both drop nothing, whoever counts the capacity.
EXACT = [
    "--dropout", 0, "--attention-dropout", 0, "--moe-second-expert-policy", "all", "--clip-norm", 0.5,
    "--moe-expert-count", 2, "--ddp-backend", "legacy_ddp", "--adam-eps", 1e-3,
]  # fmt: skip
NUM_BATCHES = 4  # of an update, over all data ranks
# By number of ranks, in the order of their turns: flags and how many ranks share each micro-batch.
LAYOUTS: dict[int, list[tuple[str, tuple[Any, ...], int]]] = {
    1: [("alone", (), 1)],
    2: [
        ("T2", TENSOR, 2),
        ("D2", (), 1),
        ("P2", PIPELINE, 2),
        ("C2 zero-1", (*CONTEXT, "--use-distributed-optimizer"), 2),
    ],
    4: [
        ("D2T2", TENSOR, 2),
        ("D2C2 zero-1", (*CONTEXT, "--use-distributed-optimizer"), 2),
        ("D4", (), 1),
        ("P2D2 zero-1", (*PIPELINE, "--use-distributed-optimizer"), 2),
        ("D2T2 zero-3", (*TENSOR, "--use-torch-fsdp2"), 2),
        ("C2T2X2", (*TENSOR, *CONTEXT, "--expert-tensor-parallel-size", 2), 4),
    ],
}
UPDATES = 1  # of each turn: the epoch has 16


def take_turns(rank: int, data: str, folder: str, start: str | None) -> dict[str, Any]:
    """Let each layout go on where the one before has stopped; report what it holds at first, and what it logs."""
    from fairseq_moe.distributed import barrier, world_size

    found, before = {}, start
    for name, flags, sharing in LAYOUTS[world_size()]:
        target = f"{folder}/{name}"
        if rank == 0 and before is not None:
            shutil.copytree(before, target)
        barrier()
        freq = NUM_BATCHES * sharing // world_size()
        run = RealRun(data, target, world_size(), *EXACT, *flags, "--update-freq", freq)
        found[name] = {"held": held_by_all(run.trainer), "logged": run.train(UPDATES)}
        run.save()
        barrier()
        before = target
    return found


def held_by_all(trainer: Any) -> dict[str, Tensor]:
    """Collect all parameters and moments of all ranks as ``contents`` does those of a file."""
    from fairseq_moe.distributed import gather_values
    from fairseq_moe.stock.checkpoint.named_state import snapshot
    from fairseq_moe.stock.run import run_of

    run = run_of(trainer)
    found: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for content in gather_values(snapshot(run.state, run.mesh, with_optimizer=True)):
        for key, tensor in content.tensors().items():
            if ".experts." in key:
                rows.setdefault(key, {}).update(zip(content.expert_ids, tensor, strict=True))
            else:
                assert key not in found, f"{key} is held twice"
                found[key] = tensor.clone()
    return found | {key: torch.stack([by_id[id] for id in sorted(by_id)]) for key, by_id in rows.items()}


@pytest.mark.slow_reliability
def test_layouts_that_share_micro_batches_go_on_with_one_another(text_data: Path, tmp_path: Path) -> None:
    saved: Path | None = None
    logged = []
    for world_size in (2, 4, 1):
        start = None if saved is None else str(saved)
        by_rank = run_ranks(take_turns, world_size, str(text_data), str(tmp_path), start, timeout=200)
        for name in by_rank[0]:
            first = by_rank[0][name]
            assert [found[name]["logged"] for found in by_rank] == [first["logged"]] * world_size
            if saved is not None:
                assert_holds(first["held"], saved / "checkpoint_last.pt", name)
            logged += first["logged"]
            saved = tmp_path / name
    alone = run_ranks(train_alone, 1, str(text_data), str(tmp_path / "reference"), len(logged))[0]
    assert len(alone) == len(logged) == UPDATES * sum(map(len, LAYOUTS.values()))
    for one, other in zip(logged, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def assert_holds(held: dict[str, Tensor], file: Path, name: str) -> None:
    expected = {key: value for key, value in contents(file).items() if torch.is_tensor(value)}
    assert held.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(held[key], value), f"{key} under {name}"


def train_alone(rank: int, data: str, folder: str, updates: int) -> list[dict[str, float]]:
    return RealRun(data, folder, 1, *EXACT, "--update-freq", NUM_BATCHES).train(updates)
