"""--save-in-background: what is written is the state at the save, it is complete or absent, and training goes on."""

import os
import time
from pathlib import Path

import pytest
import torch

from fairseq_moe.checkpoint import Checkpoint, ShardContent
from fairseq_moe.faults import VARIABLE
from tests.helpers.backends import BACKENDS, ZERO
from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.ranks import RankError, run_ranks

FLAGS = ["--save-interval-updates", 1, "--keep-interval-updates", 2]
BACKGROUND = [*FLAGS, "--save-in-background"]
SLOW = "save.shard_half@1@2=sleep:3"  # the second shard of rank 1 ends last, by a margin
NEW = ["checkpoint_1_2.pt", "checkpoint_last.pt"]


def save_and_go_on(rank: int, save_dir: str, flags: list[str], fault: str | None) -> list[list[str]]:
    """Save after two of four updates; returns the main files that are there then and later."""
    from fairseq_moe.stock.run import end_of_run
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *flags)
    if fault is not None:
        os.environ[VARIABLE] = fault
    seen = []

    def look() -> None:
        seen.append(sorted(path.name for path in Path(save_dir).glob("*.pt")))

    run.train(1)
    run.save()
    end_of_run()
    look()
    run.train(1)
    run.save()
    look()
    run.train(2)
    look()
    end_of_run()
    look()
    return seen


@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded", *ZERO])
def test_the_state_is_that_of_the_save_whatever_training_does_meanwhile(backend: str, tmp_path: Path) -> None:
    flags = BACKENDS[backend]
    run_ranks(save_and_go_on, 2, str(tmp_path / "now"), [*FLAGS, *flags], None)
    seen = run_ranks(save_and_go_on, 2, str(tmp_path / "later"), [*BACKGROUND, *flags], SLOW)[0]
    old = ["checkpoint_1_1.pt", "checkpoint_last.pt"]
    assert seen == [old, old, old, ["checkpoint_1_1.pt", *NEW]]
    for name in NEW:
        Checkpoint.open(tmp_path / "later" / name).verify()
        assert_same(contents(tmp_path / "later" / name), contents(tmp_path / "now" / name))
        assert manifest_of(tmp_path / "later" / name)["update"] == 2


def save_without_copying(rank: int, save_dir: str) -> None:
    ShardContent.copied = lambda self, into=None: self  # type: ignore[method-assign]
    save_and_go_on(rank, save_dir, [*BACKGROUND], SLOW)


def test_without_the_copy_later_updates_would_be_in_it(tmp_path: Path) -> None:
    run_ranks(save_and_go_on, 2, str(tmp_path / "now"), FLAGS, None)
    run_ranks(save_without_copying, 2, str(tmp_path / "later"))
    with pytest.raises(AssertionError):
        assert_same(contents(tmp_path / "later" / NEW[0]), contents(tmp_path / "now" / NEW[0]))


def train_until_saved(rank: int, save_dir: str) -> int:
    """The updates after the save at which the checkpoint is there, without anybody asking for it."""
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *BACKGROUND)
    run.train(1)
    run.save()
    deadline = time.monotonic() + 60
    while run.record.background is not None and time.monotonic() < deadline:
        run.train(1)
    assert (Path(save_dir) / "checkpoint_last.pt").exists() or rank > 0
    return run.num_updates


def test_it_is_committed_by_an_update_once_all_ranks_have_written(tmp_path: Path) -> None:
    updates = run_ranks(train_until_saved, 2, str(tmp_path))
    assert updates[0] == updates[1] > 1
    assert manifest_of(tmp_path / "checkpoint_last.pt")["update"] == 1


def fail_in_background(rank: int, save_dir: str) -> tuple[int, float | None]:
    from fairseq import checkpoint_utils

    from fairseq_moe.stock.run import end_of_run
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *BACKGROUND)
    run.train(1)
    run.save(val_loss=3.0)
    end_of_run()
    os.environ[VARIABLE] = "save.shard_half@1=enospc"
    run.train(1)
    run.save(val_loss=2.0)
    end_of_run()
    return run.record.num_failed_saves, getattr(checkpoint_utils.save_checkpoint, "best", None)


def test_a_failure_is_agreed_counted_and_leaves_the_old_set(tmp_path: Path) -> None:
    results = run_ranks(fail_in_background, 2, str(tmp_path))
    assert [failed for failed, _ in results] == [1, 1]
    assert results[0][1] == 3.0  # the better score has no file
    assert manifest_of(tmp_path / "checkpoint_best.pt")["update"] == 1
    assert [path.name[0] for path in (tmp_path / "shards").iterdir()] == ["1"]


@pytest.mark.parametrize(
    "place",
    ["save.background_begun@1@2", "save.shard_half@0@2", "save.after_shard@1@2", "save.main_flushed@0@2"],
)
def test_a_kill_costs_the_new_set_alone(place: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(save_and_go_on, 2, str(tmp_path), BACKGROUND, f"{place}=kill")
    path = tmp_path / "checkpoint_last.pt"
    Checkpoint.open(path).verify()
    assert manifest_of(path)["update"] == 1


def test_a_copy_shares_no_memory() -> None:
    weight = torch.ones(2)
    content = ShardContent(model={"w": weight}, optimizer={"w": {"exp_avg": weight, "step": 3}})
    copy = content.copied()
    weight.zero_()
    assert copy.model["w"].tolist() == copy.optimizer["w"]["exp_avg"].tolist() == [1, 1]
    assert copy.optimizer["w"]["step"] == 3
    again = content.copied(copy)
    assert again.model["w"].data_ptr() == copy.model["w"].data_ptr() != weight.data_ptr()
    assert again.model["w"].tolist() == again.optimizer["w"]["exp_avg"].tolist() == [0, 0]
    larger = ShardContent(model={"w": torch.ones(3)}).copied(again)
    assert larger.model["w"].tolist() == [1, 1, 1]
