"""What is said to be written outlasts a power cut: bytes are flushed before the rename, directory entries after it."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fairseq_moe.checkpoint import SetId, copy_atomically, write_shard
from fairseq_moe.checkpoint.files import write_large, write_plain
from fairseq_moe.convert import from_hf, to_hf
from tests.helpers.checkpoints import small_checkpoint, small_content
from tests.helpers.formats import model, write_dense, write_ours
from tests.helpers.power_cut import PowerCut
from tests.helpers.tools import run


def _shard(folder: Path) -> None:
    set_id = SetId(run_id="run", update=7, name="7-set")
    write_shard(folder, set_id, index=0, num_shards=1, content=small_content(4))


# The file, the directory that got its entry, and the directories that are new themselves, up to one that is not.
_FILES: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "shard": (_shard, "shard-0-of-1.safetensors", ["7-set", "shards", "disk"]),
    "main": (lambda folder: write_plain(folder / "a.pt", {"a": 1}), "a.pt", ["disk"]),
    "large": (lambda folder: write_large(folder / "a.pt", {"a": 1}), "a.pt", ["disk"]),
    "copy": (lambda folder: copy_atomically(folder.parent / "source", folder / "b.pt"), "b.pt", ["disk"]),
    "new folder": (lambda folder: write_large(folder / "x/y/a.pt", {}), "a.pt", ["y", "x", "disk"]),
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An empty directory, beside which lies a file."""
    (tmp_path / "source").write_bytes(b"what is copied")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.mark.parametrize("kind", _FILES)
def test_flush_rename_flush_the_directory(kind: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, name, directories = _FILES[kind]
    cut = PowerCut(monkeypatch, disk)
    write(disk)
    assert cut.steps == [
        f"flush {name}.tmp-{os.getpid()}",
        f"rename {name}",
        *(f"flush {directory}" for directory in directories),
    ]
    assert cut.early == []
    assert cut.lost() == []


def test_all_shards_are_on_the_disk_before_the_main_file_has_its_name(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = PowerCut(monkeypatch, disk)
    small_checkpoint(disk / "a.pt", num_shards=4)
    assert cut.lost_at_rename["a.pt"] == []
    assert cut.lost_at_rename.keys() >= {f"shard-{index}-of-4.safetensors" for index in range(4)}
    assert cut.lost() == []


@pytest.mark.parametrize(
    "argv",
    [
        ["reshard", "moe.pt", "--shards", 2],
        ["consolidate", "moe.pt"],
        ["average", "moe.pt", "other.pt"],
        ["average", "dense.pt", "dense2.pt"],
        ["to-dense", "moe.pt", "--mean"],
    ],
    ids=lambda argv: " ".join(map(str, argv)),
)
def test_what_the_tools_write(argv: list[object], disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for update, name in enumerate(("moe.pt", "other.pt")):
        write_ours(disk.parent / name, model(update), update=update)
    for update, name in enumerate(("dense.pt", "dense2.pt")):
        write_dense(disk.parent / name, update=update)
    cut = PowerCut(monkeypatch, disk)
    tool, *rest = (disk.parent / part if str(part).endswith(".pt") else part for part in argv)
    run(tool, *rest, "--to", disk / "new" / "out.pt")
    assert (disk / "new" / "out.pt").is_file()
    assert cut.early == cut.lost() == []


def test_what_conversions_write(
    hf_model: Callable[..., Path], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_model("mixtral")
    cut = PowerCut(monkeypatch, disk)
    from_hf(source, disk / "ours", expert_parallel_size=2)
    to_hf(disk / "ours", disk / "back")
    for name in ("ours", "back"):
        assert list((disk / name).rglob("*.safetensors"))
        assert f"rename {name}" in cut.steps
    assert cut.early == cut.lost() == []


@pytest.mark.parametrize("is_left_out", [stat.S_ISREG, stat.S_ISDIR], ids=["files", "directories"])
@pytest.mark.parametrize("kind", _FILES)
def test_these_tests_see_a_flush_that_is_left_out(
    kind: str, is_left_out: Callable[[int], bool], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = PowerCut(monkeypatch, disk)
    fsync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: None if is_left_out(os.fstat(descriptor).st_mode) else fsync(descriptor),
    )
    _FILES[kind][0](disk)
    assert cut.lost() != []
