"""R1: whichever rank is killed at whatever point of a save, the next start loads the old state or the new one.

Every kill is a SIGKILL that a rank sends itself at one of the places of ``fairseq_moe.faults``, in a save that
writes a new main file, copies it to checkpoint_last.pt, deletes the old main file and then its shards.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.checkpoint import Checkpoint
from fairseq_moe.errors import CheckpointError
from tests.helpers.backends import AXES, BACKENDS, PIPELINES
from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.ranks import RankError, run_ranks

PARTS = AXES | PIPELINES

pytestmark = pytest.mark.timeout(300)

FLAGS = ["--save-interval-updates", 1, "--keep-interval-updates", 1]
# rank 0 is killed here: what checkpoint_last.pt then is
RANK_0 = {
    "save.begin": "old", "save.after_snapshot": "old",
    "save.shard_opened": "old", "save.shard_half": "old", "save.shard_written": "old",
    "save.shard_flushed": "old", "save.shard_renamed": "old", "save.after_shard": "old", "save.agreed": "old",
    "save.main_opened": "old", "save.main_half": "old", "save.main_written": "old", "save.main_flushed": "old",
    "save.main_renamed": "old", "save.committed": "old",
    "save.copy_opened": "old", "save.copy_half": "old", "save.copy_written": "old", "save.copy_flushed": "old",
    "save.copy_renamed": "new", "save.before_prune": "new", "save.pruned_one": "new", "save.end": "new",
}  # fmt: skip
# rank 1 is killed here; after the last two rank 0 may or may not come through
RANK_1 = {
    "save.begin": "old", "save.after_snapshot": "old",
    "save.shard_opened": "old", "save.shard_half": "old", "save.shard_written": "old",
    "save.shard_flushed": "old", "save.shard_renamed": "old", "save.after_shard": "old",
    "save.agreed": "old or new", "save.committed": "old or new", "save.end": "new",
}  # fmt: skip
KILLS = {f"{point}@0": state for point, state in RANK_0.items()} | {
    f"{point}@1": state for point, state in RANK_1.items()
}


def save_twice(rank: int, save_dir: str, fault: str | None, flags: Sequence[str] = ()) -> None:
    """Save after the first and after the second update; the second time with a fault."""
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *FLAGS, *flags)
    run.train(1)
    run.save()
    run.train(1)
    run.save(fault=fault)


def load_and_save_each(rank: int, save_dirs: list[str], flags: Sequence[str] = ()) -> list[int]:
    """Start again in each directory: load, train, save; returns the updates that were found."""
    from tests.helpers.saves import TinyRun

    found = []
    run = TinyRun(Path(save_dirs[0]), *FLAGS, *flags)
    for save_dir in save_dirs:
        run.checkpoint_cfg.save_dir = save_dir
        run.load()
        found.append(run.num_updates)
        run.train(1)
        run.save()
    return found


def kill(save_dir: Path, place: str, flags: Sequence[str] = ()) -> None:
    with pytest.raises(RankError, match=rf"rank {place[-1]}: died with exit code -9"):
        run_ranks(save_twice, 2, str(save_dir), f"{place}=kill", flags)


def states_in(folder: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """What the two saves hold when nobody is killed."""
    run_ranks(save_twice, 2, str(folder / "new"), None, flags)
    with pytest.raises(RankError, match=r"injected at save\.begin"):
        run_ranks(save_twice, 2, str(folder / "old"), "save.begin@0=raise", flags)
    return {name: contents(folder / name / "checkpoint_last.pt") for name in ("old", "new")}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What any kill has to leave."""
    return states_in(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each place at which a rank was killed."""
    folder = tmp_path_factory.mktemp("killed")
    directories = {place: folder / place for place in KILLS}
    for place, directory in directories.items():
        kill(directory, place)
    return directories


@pytest.mark.parametrize("place", KILLS)
def test_the_last_checkpoint_is_the_old_one_or_the_new_one_to_the_bit(
    place: str, killed: dict[str, Path], states: dict[str, Any]
) -> None:
    last = killed[place] / "checkpoint_last.pt"
    found = "old" if manifest_of(last)["update"] == 1 else "new"
    assert found in KILLS[place]
    assert_same(contents(last), states[found])
    for main in killed[place].glob("*.pt"):
        Checkpoint.open(main).verify()


def test_the_next_start_loads_it_and_its_save_clears_the_remains_away(killed: dict[str, Path]) -> None:
    assert len(killed) >= 24
    lasts = [directory / "checkpoint_last.pt" for directory in killed.values()]
    updates = [manifest_of(last)["update"] for last in lasts]
    found = run_ranks(load_and_save_each, 2, [str(directory) for directory in killed.values()])
    assert found == [updates, updates]
    for last in lasts:
        assert manifest_of(last)["update"] > 1
        named = {
            Path(manifest_of(main)["shards"][0]["file"]).parent.name for main in last.parent.glob("*.pt")
        }
        assert {path.name for path in (last.parent / "shards").iterdir()} == named
        assert not list(last.parent.rglob("*.tmp-*"))


@pytest.mark.slow_reliability
@pytest.mark.parametrize("flags", [BACKENDS["zero3"], *PARTS.values()], ids=["zero3", *PARTS])
def test_parts_of_states_are_the_old_or_the_new_ones_too(flags: list[str], tmp_path: Path) -> None:
    """The other rank is gathering when rank 1 dies at the first place."""
    places = {"save.begin@1": "old", "save.after_snapshot@0": "old", "save.copy_renamed@0": "new"}
    expected = states_in(tmp_path, flags)
    for place in places:
        kill(tmp_path / place, place, flags)
    for place, state in places.items():
        assert_same(contents(tmp_path / place / "checkpoint_last.pt"), expected[state])
    found = run_ranks(load_and_save_each, 2, [str(tmp_path / place) for place in places], flags)
    assert found == [[1, 1, 2]] * 2


def save_once(rank: int, save_dir: str, fault: str) -> None:
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *FLAGS)
    run.train(1)
    run.save(fault=fault)


@pytest.mark.parametrize(
    ("place", "update"), [("save.main_flushed", 0), ("save.main_renamed", 1), ("save.copy_half", 1)]
)
def test_a_first_save_that_was_killed_after_its_commit_is_found(
    place: str, update: int, tmp_path: Path
) -> None:
    """There is no checkpoint_last.pt yet; the old state is that of a fresh start."""
    with pytest.raises(RankError, match="rank 0: died with exit code -9"):
        run_ranks(save_once, 2, str(tmp_path), f"{place}@0=kill")
    assert run_ranks(load_and_save_each, 2, [str(tmp_path)]) == [[update], [update]]


def save_twice_copying_in_place(rank: int, save_dir: str) -> None:
    """As ``save_twice``, without the guard: the copy is written over the old file."""
    from fairseq_moe.stock.checkpoint import retention

    def copy_in_place(source: Path, target: Path) -> None:
        data = source.read_bytes()
        if target.exists():
            target.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        target.write_bytes(data)

    retention.copy_atomically = copy_in_place
    save_twice(rank, save_dir, None)


def test_without_the_guard_a_kill_leaves_a_torn_file(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0: died with exit code -9"):
        run_ranks(save_twice_copying_in_place, 2, str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot read checkpoint file"):
        Checkpoint.open(tmp_path / "checkpoint_last.pt")
