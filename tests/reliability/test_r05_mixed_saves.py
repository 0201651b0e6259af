"""R5: shards of two saves, or of two runs, are never loaded together, and the sentence says what was mixed."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from fairseq_moe.checkpoint import MANIFEST_KEY, Checkpoint
from fairseq_moe.checkpoint.files import sha256_of
from fairseq_moe.errors import CheckpointError
from tests.helpers.checkpoints import EXPERTS, small_checkpoint


def swap(path: Path, other: Path, index: int = 1) -> tuple[Path, Path]:
    """Put a shard of ``other`` in the place of that of ``path``; returns (where from, where to)."""
    source, target = (
        main.parent / Checkpoint.open(main).manifest.shards[index].file for main in (other, path)
    )
    shutil.copyfile(source, target)
    return source, target


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"update": 8}, "belongs to run a, update 8, set 8-"),
        ({"run_id": "b"}, "belongs to run b, update 7, set 7-"),
        ({"update": 7}, "belongs to run a, update 7, set 7-"),  # the same update, saved again
    ],
)
def test_a_shard_of_another_save_is_refused(other: dict[str, object], said: str, tmp_path: Path) -> None:
    main = small_checkpoint(tmp_path / "checkpoint_last.pt")
    another = small_checkpoint(tmp_path / "checkpoint_1_8.pt", seed=2, **other)  # type: ignore[arg-type]
    source, target = swap(main, another)
    assert source.stat().st_size == target.stat().st_size
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(main).verify()
    sentence = str(raised.value)
    assert sentence.startswith(f"shard {target} (experts 2, 3, and dense tensors) has sha256 ")
    assert said in sentence
    assert re.search("expects run a, update 7, set 7-[0-9a-f]{8}: restore all files of one save", sentence)


def test_also_where_the_main_file_vouches_for_it(tmp_path: Path) -> None:
    """A list of shards put together by hand has the right digests and the wrong files."""
    main = small_checkpoint(tmp_path / "checkpoint_last.pt")
    _, target = swap(main, small_checkpoint(tmp_path / "checkpoint_1_8.pt", seed=2, update=8))
    state = torch.load(main, weights_only=True)
    state[MANIFEST_KEY]["shards"][1]["sha256"] = sha256_of(target)
    torch.save(state, main)
    with pytest.raises(CheckpointError, match=r"says that it belongs to run a, update 8"):
        Checkpoint.open(main).verify()


def test_a_list_that_names_two_sets_is_refused(tmp_path: Path) -> None:
    mains = [small_checkpoint(tmp_path / f"checkpoint_1_{n}.pt", update=n) for n in (7, 8)]
    states = [torch.load(main, weights_only=True) for main in mains]
    states[0][MANIFEST_KEY]["shards"][1] = states[1][MANIFEST_KEY]["shards"][1]
    torch.save(states[0], mains[0])
    with pytest.raises(CheckpointError, match="names shards of several sets, expected one"):
        Checkpoint.open(mains[0])


def test_without_the_check_half_of_another_save_would_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq_moe.checkpoint.reader.shard_problem", lambda *args: None)
    main = small_checkpoint(tmp_path / "checkpoint_last.pt")
    another = small_checkpoint(tmp_path / "checkpoint_1_8.pt", seed=2, update=8)
    own, others = (Checkpoint.open(path).tensor(f"model/{EXPERTS}").load() for path in (main, another))
    swap(main, another)
    checkpoint = Checkpoint.open(main)
    checkpoint.verify()
    mixed = checkpoint.tensor(f"model/{EXPERTS}").load()
    assert torch.equal(mixed[:2], own[:2])
    assert torch.equal(mixed[2:], others[2:])
