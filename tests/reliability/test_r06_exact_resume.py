"""R6: three updates, a save, a new start and three more are six updates: to the bit, with dropout and jitter on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.backends import AXES, BACKENDS, PIPELINES
from tests.helpers.checkpoints import assert_same, contents
from tests.helpers.ranks import run_ranks
from tests.helpers.real_runs import RealRun, train

MEGATRON = [
    "--moe-freq", 0, "--moe-expert-count", 0, "--num-experts", 4, "--moe-layer-freq", 2,
    "--moe-input-jitter-eps", 0.1, "--moe-aux-loss-coeff", 0.01, "--attention-dropout", 0.1,
]  # fmt: skip
BRANCH = ["--moe-second-expert-policy", "sampling", "--attention-dropout", 0.1]
CASES = {"jitter": MEGATRON, "sampling": BRANCH}
LAYOUTS = (
    BACKENDS
    | AXES
    | PIPELINES
    | {
        "C2 zero1": [*AXES["C2"], *BACKENDS["zero1"]],
        "P2 T2": [*PIPELINES["P2"], *AXES["T2"], "--update-freq", 4],
    }
)


def run(
    rank: int, data: str, save_dir: str, world_size: int, flags: list[Any], counts: list[int]
) -> list[Any]:
    """Several starts in one directory, each with so many updates; what all of them logged."""
    logged: list[Any] = []
    for count in counts:
        started = RealRun(data, save_dir, world_size, *flags)
        logged += started.train(count)
        started.save()
        torch.manual_seed(rank + 77)  # a new process knows nothing of the random numbers of the old one
    return logged


@pytest.mark.parametrize(
    ("world_size", "case", "backend"),
    [
        (1, "jitter", "legacy_ddp"),
        (2, "jitter", "legacy_ddp"),
        (2, "sampling", "fully_sharded"),
        (2, "jitter", "zero1"),
        (2, "sampling", "zero3"),
        (2, "jitter", "T2"),
        (2, "sampling", "C2"),
        (2, "jitter", "P2"),
        *(
            pytest.param(4, case, backend, marks=pytest.mark.slow_reliability)
            for case in CASES
            for backend in ("legacy_ddp", "fully_sharded", "zero1", "zero3")
        ),
        *(
            pytest.param(4, case, layout, marks=pytest.mark.slow_reliability)
            for case, layout in (
                ("sampling", "T2"),
                ("jitter", "C2 zero1"),
                ("sampling", "P2"),
                ("jitter", "P2 T2"),
            )
        ),
    ],
)
def test_resumed_training_is_the_same_to_the_bit(
    world_size: int, case: str, backend: str, text_data: Path, tmp_path: Path
) -> None:
    flags = [*CASES[case], *LAYOUTS[backend]]
    logged, final = [], []
    for name, counts in (("whole", [6]), ("halves", [3, 3])):
        folder = str(tmp_path / name)
        logged.append(run_ranks(run, world_size, str(text_data), folder, world_size, flags, counts))
        final.append(contents(tmp_path / name / "checkpoint_last.pt"))
    assert logged[1] == logged[0]
    assert len({entry["loss"] for entry in logged[0][0]}) == 6
    assert_same(final[1], final[0])


def run_forgetting_moments(
    rank: int, data: str, save_dir: str, world_size: int, flags: list[Any], counts: list[int]
) -> list[Any]:
    """As ``run``, but a start does not take up the optimizer's state."""
    from fairseq_moe.stock.checkpoint import loading

    loading.load_optimizer = lambda trainer, state, saved, **kwargs: trainer.set_num_updates(3)
    return run(rank, data, save_dir, world_size, flags, counts)


def test_without_the_moments_it_would_not_be(text_data: Path, tmp_path: Path) -> None:
    flags = ["--ddp-backend", "legacy_ddp"]
    (whole,) = run_ranks(run, 1, str(text_data), str(tmp_path / "whole"), 1, flags, [6])
    (halves,) = run_ranks(
        run_forgetting_moments, 1, str(text_data), str(tmp_path / "halves"), 1, flags, [3, 3]
    )
    assert halves[:4] == whole[:4]
    assert halves[4:] != whole[4:]


def test_the_command_resumes_to_the_bit(text_data: Path, tmp_path: Path) -> None:
    for updates in ("3", "6"):
        assert train(text_data, tmp_path / "halves", "--max-update", updates).exit_code == 0
    assert train(text_data, tmp_path / "whole", "--max-update", "6").exit_code == 0
    whole, halves = (contents(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "halves"))
    assert_same(halves, whole)
