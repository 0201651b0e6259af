"""R25: saving the same update twice, or resuming and saving it again, changes no number and leaves no rubbish."""

from pathlib import Path

import pytest

from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.ranks import run_ranks


def save_again(rank: int, save_dir: str, other_dir: str) -> None:
    """Save one update three times: twice in one run, then in a run that has loaded it."""
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), "--save-interval-updates", 1)
    run.train(2)
    run.save()
    run.checkpoint_cfg.save_dir = other_dir
    run.save()
    run.save()
    run.checkpoint_cfg.save_dir = save_dir
    resumed = TinyRun(Path(save_dir), "--save-interval-updates", 1)
    resumed.load()
    assert resumed.num_updates == 2
    resumed.save()


def save_again_without_pruning(rank: int, save_dir: str, other_dir: str) -> None:
    from fairseq_moe.stock.checkpoint import saving

    saving.prune_sets = lambda directory, committed: None
    save_again(rank, save_dir, other_dir)


def _assert_one_set(folder: Path) -> None:
    manifests = [manifest_of(folder / name) for name in ("checkpoint_1_2.pt", "checkpoint_last.pt")]
    assert manifests[0] == manifests[1]
    kept = [path.name for path in (folder / "shards").iterdir()]
    assert kept == [manifests[0]["shards"][0]["file"].split("/")[1]]


def test_the_last_save_of_an_update_counts_and_is_the_same(tmp_path: Path) -> None:
    once, twice = tmp_path / "resumed", tmp_path / "twice"
    run_ranks(save_again, 2, str(once), str(twice))
    for folder in (once, twice):
        _assert_one_set(folder)
    assert_same(contents(once / "checkpoint_last.pt"), contents(twice / "checkpoint_last.pt"))
    runs = {manifest_of(folder / "checkpoint_last.pt")["run_id"] for folder in (once, twice)}
    assert len(runs) == 1


def test_without_pruning_the_earlier_saves_of_it_are_left(tmp_path: Path) -> None:
    once, twice = tmp_path / "resumed", tmp_path / "twice"
    run_ranks(save_again_without_pruning, 2, str(once), str(twice))
    for folder in (once, twice):
        with pytest.raises(AssertionError):
            _assert_one_set(folder)
