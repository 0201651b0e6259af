"""R26: retention never deletes the last verified set, and of the others only what is older and unreferenced."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.checkpoint import Checkpoint, ModelShape, ShardContent, prune_sets, write_checkpoint
from tests.helpers.checkpoints import manifest_of
from tests.helpers.ranks import run_ranks

EXPERTS = "decoder.layers.1.moe_layer.experts.fc1_weight"


def write(path: Path, update: int) -> Path:
    """A checkpoint of two shards; returns its set's directory, which an hour per update makes younger."""
    contents = [
        ShardContent(expert_ids=[expert], model={EXPERTS: torch.full((1, 2), float(update))})
        for expert in range(2)
    ]
    manifest = write_checkpoint(
        path,
        state={},
        run_id="run",
        update=update,
        shape=ModelShape(num_experts=2, top_k=1, model_dim=2, expert_dim=1, num_layers=1),
        contents=contents,
        num_shards=2,
    )
    folder = path.parent / manifest.set_dir
    for file in (path, folder, *folder.iterdir()):
        make_hour(file, update)
    return folder


def make_hour(path: Path, hour: int) -> None:
    os.utime(path, (3600 * hour, 3600 * hour))


def sets_in(directory: Path) -> set[str]:
    return {path.name for path in (directory / "shards").iterdir()}


def test_what_a_main_file_names_stays_and_what_none_names_goes(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"checkpoint_1_{update}.pt", update) for update in (1, 2, 3)]
    (tmp_path / "checkpoint_1_1.pt").unlink()
    shutil.copy2(tmp_path / "checkpoint_1_2.pt", tmp_path / "checkpoint_best.pt")
    (tmp_path / "checkpoint_1_2.pt").unlink()
    prune_sets(tmp_path, committed=tmp_path / "checkpoint_1_3.pt")
    assert sets_in(tmp_path) == {folders[1].name, folders[2].name}


def test_a_set_that_is_being_written_stays(tmp_path: Path) -> None:
    committed = tmp_path / "checkpoint_1_2.pt"
    write(committed, 2)
    young = write(tmp_path / "other" / "x.pt", 3)
    shutil.copytree(young, tmp_path / "shards" / young.name)
    old = tmp_path / "shards" / "1-dead"
    shutil.copytree(young, old)
    for file in (*old.iterdir(), old):
        make_hour(file, 1)
    prune_sets(tmp_path, committed=committed)
    assert young.name in sets_in(tmp_path)
    assert old.name not in sets_in(tmp_path)


def test_remains_of_killed_writers_go(tmp_path: Path) -> None:
    committed = tmp_path / "checkpoint_1_2.pt"
    write(committed, 2)
    for hour, name in ((1, "checkpoint_last.pt.tmp-77"), (3, "checkpoint_last.pt.tmp-78")):
        (tmp_path / name).write_bytes(b"half")
        make_hour(tmp_path / name, hour)
    prune_sets(tmp_path, committed=committed)
    assert [path.name for path in tmp_path.glob("*.tmp-*")] == ["checkpoint_last.pt.tmp-78"]


def damage_nothing(path: Path) -> None:
    """Leave the file alone."""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_name_of_its_set(path: Path) -> None:
    """The main file would name another set, if nobody looked at its checksums."""
    name = manifest_of(path)["shards"][0]["file"].split("/")[1].encode()
    path.write_bytes(path.read_bytes().replace(name, bytes([name[0] ^ 1]) + name[1:]))


@pytest.mark.parametrize("damage", [cut, empty, flip_name_of_its_set])
def test_nothing_goes_while_a_main_file_cannot_be_read(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for update in (1, 2, 3):
        write(tmp_path / f"checkpoint_1_{update}.pt", update)
    (tmp_path / "checkpoint_1_1.pt").unlink()
    damaged = tmp_path / "checkpoint_1_2.pt"
    damage(damaged)
    prune_sets(tmp_path, committed=tmp_path / "checkpoint_1_3.pt")
    assert len(sets_in(tmp_path)) == 3
    assert "Old shards are kept" in caplog.text
    assert str(damaged) in caplog.text


def test_without_the_checksums_a_good_set_would_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq_moe.checkpoint.files.check_records", damage_nothing)
    for update in (2, 3):
        write(tmp_path / f"checkpoint_1_{update}.pt", update)
    flip_name_of_its_set(tmp_path / "checkpoint_1_2.pt")
    prune_sets(tmp_path, committed=tmp_path / "checkpoint_1_3.pt")
    assert len(sets_in(tmp_path)) == 1


def save_beside_newer_numbers(rank: int, save_dir: str, guarded: bool) -> str | None:
    """Save update 1 into a directory whose files of updates 7 and 8 are damaged, keeping two files."""
    from fairseq_moe.stock.checkpoint import retention
    from tests.helpers.saves import TinyRun

    if not guarded:
        retention.current_save = lambda: None
    run = TinyRun(
        Path(save_dir), "--save-interval-updates", 1, "--keep-interval-updates", 2, "--no-last-checkpoints"
    )
    run.train(1)
    return run.save()


@pytest.mark.parametrize("guarded", [True, False])
def test_the_file_just_written_outlives_damaged_ones_with_higher_numbers(
    guarded: bool, tmp_path: Path
) -> None:
    folders = [write(tmp_path / f"checkpoint_1_{update}.pt", update) for update in (6, 7, 8)]
    for folder in folders[1:]:
        (folder / "shard-0-of-2.safetensors").unlink()
    run_ranks(save_beside_newer_numbers, 1, str(tmp_path), guarded)
    written = tmp_path / "checkpoint_1_1.pt"
    assert written.exists() is guarded
    if guarded:
        Checkpoint.open(written).verify()
