"""R3: a disk that is full for one rank fails the save for all of them, costs nothing, and ends no run at once."""

import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from fairseq_moe.checkpoint import Checkpoint
from tests.helpers.backends import PIPELINES
from tests.helpers.checkpoints import manifest_of
from tests.helpers.ranks import RankError, run_ranks

FLAGS = ["--save-interval-updates", 1, "--keep-interval-updates", 1]
PLACES = [
    "save.shard_opened@0", "save.shard_half@1", "save.shard_written@1", "save.after_shard@1",
    "save.main_half@0", "save.main_flushed@0",
]  # fmt: skip


def save_three_times(
    rank: int, save_dir: str, place: str, layout: Sequence[str] = ()
) -> tuple[list[str | None], list[float]]:
    """Save after each of three updates, the second time on a full disk; returns saved files and losses."""
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *FLAGS, *layout)
    saved, losses = [], []
    for fault in (None, f"{place}=enospc", None):
        losses += [numbers["loss"] for numbers in run.train(1)]
        saved.append(run.save(fault=fault))
        if fault is not None:
            assert not list(Path(save_dir).rglob("*.tmp-*"))
            names = sorted(path.name for path in Path(save_dir).glob("*.pt"))
            assert names == ["checkpoint_1_1.pt", "checkpoint_last.pt"]
            assert [path.name[0] for path in (Path(save_dir) / "shards").iterdir()] == ["1"]
            assert manifest_of(Path(save_dir) / "checkpoint_last.pt")["update"] == 1
    return saved, losses


@pytest.mark.parametrize(
    ("place", "layout"),
    [
        *((place, []) for place in PLACES),
        *(("save.shard_half@1", flags) for flags in PIPELINES.values()),  # the disk of the last stage
    ],
)
def test_a_full_disk_leaves_the_old_set_and_training_goes_on(
    place: str, layout: list[str], tmp_path: Path
) -> None:
    results = run_ranks(save_three_times, 2, str(tmp_path), place, layout)
    saved, losses = results[0]
    assert [path and Path(path).name for path in saved] == ["checkpoint_1_1.pt", None, "checkpoint_1_3.pt"]
    assert len(losses) == 3
    assert results[1] == ([None] * 3, losses)
    assert manifest_of(tmp_path / "checkpoint_last.pt")["update"] == 3


def save_until_the_end(rank: int, save_dir: str) -> str:
    """Every save of rank 1 fails at the operating system's limit of a file's size."""
    from fairseq_moe.errors import CheckpointError
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *FLAGS, "--max-failed-saves", 2)
    run.train(1)
    run.save()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    run.train(1)
    assert run.save() is None
    run.train(1)
    with pytest.raises(CheckpointError) as raised:
        run.save()
    assert raised.value.agreed
    return str(raised.value)


def test_several_failures_in_a_row_end_the_run_with_one_sentence(tmp_path: Path) -> None:
    first = run_ranks(save_until_the_end, 2, str(tmp_path))
    assert first[0] == first[1]
    assert (
        "the save at update 3 failed: rank 1 could not write its shard ([Errno 27] File too large" in first[0]
    )
    assert "failure 2 in a row (--max-failed-saves 2)" in first[0]
    assert manifest_of(tmp_path / "checkpoint_last.pt")["update"] == 1
    Checkpoint.open(tmp_path / "checkpoint_last.pt").verify()


def save_best_on_a_full_disk(rank: int, save_dir: str) -> list[list[str]]:
    """A better score whose file could not be written is not the best one."""
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir))
    names = []
    for val_loss, fault in ((3.0, None), (1.0, "save.main_half@0=enospc"), (2.0, None)):
        run.train(1)
        run.save(val_loss=val_loss, fault=fault)
        names.append(manifest_of(Path(save_dir) / "checkpoint_best.pt")["update"])
    return names


def test_the_best_score_is_that_of_a_file_that_exists(tmp_path: Path) -> None:
    assert run_ranks(save_best_on_a_full_disk, 1, str(tmp_path)) == [[1, 1, 3]]


def test_a_copy_that_fails_leaves_the_old_copy(tmp_path: Path) -> None:
    results = run_ranks(save_with_a_failing_copy, 2, str(tmp_path))
    assert results[0] == results[1]
    assert results[0] == 1
    assert manifest_of(tmp_path / "checkpoint_1_2.pt")["update"] == 2
    assert manifest_of(tmp_path / "checkpoint_last.pt")["update"] == 1
    Checkpoint.open(tmp_path / "checkpoint_last.pt").verify()
    assert not list(tmp_path.rglob("*.tmp-*"))


def save_with_a_failing_copy(rank: int, save_dir: str) -> int:
    """The disk is full when checkpoint_last.pt is written; returns the failures counted."""
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *FLAGS)
    run.train(1)
    run.save()
    run.train(1)
    run.save(fault="save.copy_half@0=enospc")
    return run.record.num_failed_saves


def save_without_agreement(rank: int, save_dir: str) -> None:
    """As stock would: whoever fails is alone with it."""
    from fairseq_moe.stock.checkpoint import writing
    from tests.helpers.saves import TinyRun

    writing._raise_if_any = lambda failures, request: None
    run = TinyRun(Path(save_dir), *FLAGS)
    run.train(1)
    run.save(fault="save.shard_half@1=enospc")


def test_without_the_agreement_a_checkpoint_would_lack_a_shard(tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(save_without_agreement, 2, str(tmp_path))
