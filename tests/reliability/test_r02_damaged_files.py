"""R2: a file that is cut, empty or has one bit flipped is refused with a sentence, or loads to the bit.

A flip in a byte that carries nothing (padding, a time of day in the archive) may load. Nothing else may.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.checkpoint import Checkpoint, newest_intact
from fairseq_moe.errors import CheckpointError
from tests.helpers.checkpoints import small_checkpoint
from tests.helpers.ranks import run_ranks

NUM_FLIPS = 200
NUM_CUTS = 20


def everything(main: Path) -> dict[str, Any]:
    """All that a reader takes from a checkpoint."""
    checkpoint = Checkpoint.open(main)
    checkpoint.verify()
    model, optimizer = checkpoint.load(expert_ids=range(4), with_optimizer=True)
    return {
        "state": checkpoint.state,
        "manifest": checkpoint.manifest,
        "model": model,
        "optimizer": optimizer,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def files_of(main: Path) -> list[Path]:
    return [main, *sorted((main.parent / "shards").rglob("*.safetensors"))]


def outcomes(main: Path, damages: list[tuple[Path, bytes]]) -> list[str]:
    """For each damaged content of a file: ``same``, ``another``, or the sentence that refuses it."""
    expected = everything(main)
    found = []
    for path, damaged in damages:
        intact = path.read_bytes()
        path.write_bytes(damaged)
        try:
            found.append("same" if same(everything(main), expected) else "another")
        except CheckpointError as error:
            found.append(str(error))
            assert str(path) in found[-1]
        path.write_bytes(intact)
    return found


def flips(main: Path, count: int) -> list[tuple[Path, bytes]]:
    """Random single bits, alternately in the main file and in shards."""
    draw = random.Random(4)
    files = files_of(main)
    damages = []
    for number in range(count):
        path = files[0] if number % 2 else draw.choice(files[1:])
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        damages.append((path, bytes(data)))
    return damages


def test_random_bit_flips(tmp_path: Path) -> None:
    main = small_checkpoint(tmp_path / "checkpoint_last.pt")
    damages = flips(main, NUM_FLIPS)
    found = outcomes(main, damages)
    assert "another" not in found
    of_shards = [text for (path, _), text in zip(damages, found, strict=True) if path != main]
    assert len(of_shards) == NUM_FLIPS // 2
    digests = re.compile("has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}")
    assert all(digests.search(text) for text in of_shards)
    assert sum(text != "same" for text in found) - len(of_shards) > 20


def test_random_cuts(tmp_path: Path) -> None:
    main = small_checkpoint(tmp_path / "checkpoint_last.pt")
    draw = random.Random(5)
    damages = []
    for number in range(NUM_CUTS):
        path = draw.choice(files_of(main))
        data = path.read_bytes()
        damages.append((path, data[: draw.randrange(len(data)) if number > 2 else number]))
    found = outcomes(main, damages)
    assert not {"same", "another"} & set(found)


def test_without_the_checks_flips_load_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = small_checkpoint(tmp_path / "checkpoint_last.pt")
    monkeypatch.setattr("fairseq_moe.checkpoint.reader.shard_problem", lambda *args: None)
    monkeypatch.setattr("fairseq_moe.checkpoint.files.check_records", lambda path: None)
    damages = flips(main, NUM_FLIPS)
    found = outcomes_of_any_error(main, damages)
    wrong = {path == main for (path, _), text in zip(damages, found, strict=True) if text == "another"}
    assert wrong == {True, False}


def outcomes_of_any_error(main: Path, damages: list[tuple[Path, bytes]]) -> list[str]:
    found = []
    for damage in damages:
        intact = damage[0].read_bytes()
        try:
            found += outcomes(main, [damage])
        except Exception as error:
            damage[0].write_bytes(intact)
            found.append(str(error))
    return found


def test_an_oversized_header_is_refused_without_being_read(tmp_path: Path) -> None:
    """Also where the main file vouches for it: its digest says nothing about what is in it."""
    main = small_checkpoint(tmp_path / "checkpoint_last.pt")
    checkpoint = Checkpoint.open(main)
    shard = main.parent / checkpoint.manifest.shards[0].file
    data = shard.read_bytes()
    for length in (2**62, 200_000_000, len(data)):
        shard.write_bytes(length.to_bytes(8, "little") + data[8:])
        with pytest.raises(CheckpointError, match=f"cannot read shard {re.escape(str(shard))}"):
            Checkpoint.open(main).keys()


def test_the_newest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    mains = [
        small_checkpoint(tmp_path / f"checkpoint_1_{update}.pt", update=update, seed=update)
        for update in (8, 9, 10, 11)
    ]
    (tmp_path / "other.pt").write_bytes(b"no checkpoint")
    torch.save({"model": {}}, tmp_path / "dense.pt")
    assert newest_intact(tmp_path) == mains[3]
    mains[3].write_bytes(mains[3].read_bytes()[:-1])
    assert newest_intact(tmp_path) == mains[2]
    shard = tmp_path / Checkpoint.open(mains[2]).manifest.shards[1].file
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert newest_intact(tmp_path) == mains[1]
    Checkpoint.open(mains[1]).path.unlink()
    assert newest_intact(tmp_path) == mains[0]
    mains[0].unlink()
    assert newest_intact(tmp_path) is None


def save_then_load_damaged(rank: int, save_dir: str, pattern: str, damage: str) -> str:
    """Save after two updates, damage the second save, load it; returns what every rank is told."""
    from fairseq_moe.distributed import barrier
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), "--save-interval-updates", 1)
    for _ in range(2):
        run.train(1)
        run.save()
    before = [parameter.clone() for parameter in run.trainer.get_model().parameters()]
    barrier()
    if rank == 0:
        (path,) = Path(save_dir).glob(pattern)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes({"flip": data, "cut": data[:-3], "empty": b""}[damage])
    barrier()
    with pytest.raises(CheckpointError) as raised:
        run.load()
    assert raised.value.agreed
    assert all(map(torch.equal, before, run.trainer.get_model().parameters()))
    return str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "damage", "said"),
    [
        ("shards/2-*/shard-0-of-2.safetensors", "flip", "it is damaged"),
        ("shards/2-*/shard-1-of-2.safetensors", "cut", "it is damaged"),
        ("shards/2-*/shard-1-of-2.safetensors", "empty", "it is damaged"),
        ("checkpoint_last.pt", "flip", "cannot read checkpoint file"),
        ("checkpoint_last.pt", "empty", "cannot read checkpoint file"),
    ],
)
def test_all_ranks_say_the_same_and_name_what_is_intact(
    pattern: str, damage: str, said: str, tmp_path: Path
) -> None:
    first, second = run_ranks(save_then_load_damaged, 2, str(tmp_path), pattern, damage)
    assert first == second
    assert said in first
    (damaged,) = tmp_path.glob(pattern)
    assert str(damaged) in first
    intact = tmp_path / ("checkpoint_1_1.pt" if "shard" in pattern else "checkpoint_1_2.pt")
    assert first.endswith(f"The newest intact checkpoint there is {intact}.")
