"""Checkpoints of MoE models: nothing lost, any layout reads any other, damage is named.

Run: ``OMP_NUM_THREADS=1 pytest tests/distributed/test_checkpoint.py``.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.ranks import USER_DIR, run_cli, run_ranks
from tests.helpers.real_runs import MODEL, TRAINING, RealRun, train


def load_and_save(rank: int, data: str, save_dir: str, world_size: int, flags: list[str]) -> int:
    """Load a checkpoint into a trainer of this layout and save it again; returns the update count."""
    run = RealRun(data, save_dir, world_size, *flags)
    run.save()
    return int(run.trainer.get_num_updates())


def resave(
    data: Path, source: Path, save_dir: Path, *, world_size: int, backend: str, extra: Any = ()
) -> list[int]:
    flags = ["--restore-file", str(source), "--ddp-backend", backend, *extra]
    return run_ranks(load_and_save, world_size, str(data), str(save_dir), world_size, flags)


@pytest.fixture(scope="module")
def trained(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which two ranks have trained for three updates."""
    save_dir = tmp_path_factory.mktemp("trained")
    result = train(text_data, save_dir, "--max-update", "3")
    assert result.exit_code == 0, result.output
    return save_dir


@pytest.mark.parametrize(
    ("world_size", "backend"),
    [
        (1, "legacy_ddp"),
        (2, "pytorch_ddp"),
        (4, "legacy_ddp"),
        (1, "fully_sharded"),
        (2, "fully_sharded"),
        (4, "fully_sharded"),
    ],
)
def test_any_layout_and_backend_reads_weights_and_moments_of_two_ranks(
    trained: Path, text_data: Path, tmp_path: Path, world_size: int, backend: str
) -> None:
    source = trained / "checkpoint_last.pt"
    updates = resave(text_data, source, tmp_path / "a", world_size=world_size, backend=backend)
    assert updates == [3] * world_size
    assert_same(contents(tmp_path / "a" / "checkpoint_last.pt"), contents(source))


def test_what_other_layouts_wrote_comes_back_unchanged(
    trained: Path, text_data: Path, tmp_path: Path
) -> None:
    sources = [trained]
    for number, (world_size, backend) in enumerate(
        [(4, "fully_sharded"), (1, "legacy_ddp"), (2, "fully_sharded")]
    ):
        sources.append(tmp_path / str(number))
        before = sources[-2] / "checkpoint_last.pt"
        resave(text_data, before, sources[-1], world_size=world_size, backend=backend)
    assert_same(contents(sources[-1] / "checkpoint_last.pt"), contents(trained / "checkpoint_last.pt"))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("flag", ["--use-distributed-optimizer", "--use-torch-fsdp2"])
def test_sharded_states_read_and_write_weights_and_moments(
    trained: Path, text_data: Path, tmp_path: Path, flag: str, world_size: int
) -> None:
    """Tied embeddings included, which are loaded under two names."""
    source = trained / "checkpoint_last.pt"
    updates = resave(
        text_data, source, tmp_path / "a", world_size=world_size, backend="legacy_ddp", extra=[flag]
    )
    assert updates == [3] * world_size
    assert_same(contents(tmp_path / "a" / "checkpoint_last.pt"), contents(source))


def test_replicated_experts_in_shards_are_written_once(text_data: Path, tmp_path: Path) -> None:
    few = ["--moe-expert-count", "2"]
    assert train(text_data, tmp_path / "one", "--max-update", "2", *few, world_size=1).exit_code == 0
    source = tmp_path / "one" / "checkpoint_last.pt"
    extra = [*few, "--use-torch-fsdp2"]
    resave(text_data, source, tmp_path / "four", world_size=4, backend="legacy_ddp", extra=extra)
    main = tmp_path / "four" / "checkpoint_last.pt"
    assert sorted(shard["expert_ids"] for shard in manifest_of(main)["shards"]) == [[], [], [0], [1]]
    assert_same(contents(main), contents(source))


@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded"])
def test_replicated_experts_are_written_once(text_data: Path, tmp_path: Path, backend: str) -> None:
    few = ["--moe-expert-count", "2"]
    assert train(text_data, tmp_path / "one", "--max-update", "2", *few, world_size=1).exit_code == 0
    source = tmp_path / "one" / "checkpoint_last.pt"
    resave(text_data, source, tmp_path / "four", world_size=4, backend=backend, extra=few)
    main = tmp_path / "four" / "checkpoint_last.pt"
    assert sorted(shard["expert_ids"] for shard in manifest_of(main)["shards"]) == [[], [], [0], [1]]
    assert_same(contents(tmp_path / "four" / "checkpoint_last.pt"), contents(source))


def test_flags_that_fairseq_saves_in_a_namespace_load_again(text_data: Path, tmp_path: Path) -> None:
    argv = [text_data, "--user-dir", USER_DIR, *MODEL, *TRAINING, "--save-dir", tmp_path]
    position = argv.index("--adam-betas")
    del argv[position : position + 2]
    for updates in ("1", "2"):
        flags = ["--optimizer", "sgd", "--max-update", updates]
        result = run_cli("fairseq_cli.train", [*argv, *flags])
        assert result.exit_code == 0, result.output
    assert "(1 updates)" in result.output


def test_damage_is_named_by_one_sentence_and_no_rank_trains(
    trained: Path, text_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (damaged,) = (tmp_path / "copy").glob("shards/*/shard-1-of-2.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    result = train(text_data, tmp_path / "copy", "--max-update", "6")
    assert result.exit_codes == [2, 2]
    sentences = [line for line in result.output.splitlines() if "fairseq_moe: error" in line]
    assert len(sentences) == 1, result.output
    assert "it is damaged" in sentences[0]
    assert str(damaged) in sentences[0]
    assert "Traceback" not in result.output
    assert "train_inner" not in result.output


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_main_file_is_refused_and_runs_nothing(
    trained: Path, text_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    main, marker = tmp_path / "copy" / "checkpoint_last.pt", tmp_path / "marker"
    torch.save({**torch.load(main, weights_only=True), "bomb": _Bomb(marker)}, main)
    result = train(text_data, tmp_path / "copy", "--max-update", "6")
    assert result.exit_codes == [2, 2]
    assert not marker.exists()
    assert str(main) in result.output


def test_a_manifest_that_leaves_the_directory_is_refused(
    trained: Path, text_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    main = tmp_path / "copy" / "checkpoint_last.pt"
    state = torch.load(main, weights_only=True)
    state["fairseq_moe"]["shards"][0]["file"] = "../" + state["fairseq_moe"]["shards"][0]["file"]
    torch.save(state, main)
    result = train(text_data, tmp_path / "copy", "--max-update", "6")
    assert result.exit_codes == [2, 2]
    assert "not a plain path below its directory" in result.output


def test_another_optimizer_is_refused_with_its_flag(trained: Path, text_data: Path, tmp_path: Path) -> None:
    argv = [text_data, "--user-dir", USER_DIR, *MODEL, *TRAINING, "--save-dir", tmp_path / "new"]
    position = argv.index("--adam-betas")
    del argv[position : position + 2]
    flags = ["--optimizer", "sgd", "--max-update", "6", "--restore-file", trained / "checkpoint_last.pt"]
    result = run_cli("fairseq_cli.train", [*argv, *flags])
    assert result.exit_code == 2, result.output
    assert "--optimizer" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["train", "eval_lm"])
def test_the_format_before_the_first_release_is_named(
    command: str, trained: Path, text_data: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old.pt"
    state = torch.load(trained / "checkpoint_last.pt", weights_only=True)
    shards = [{"file": "experts/3-old/shard-0-of-1.safetensors", "expert_ids": [0, 1, 2, 3]}]
    manifest = {"version": 1, "update": 3, "num_experts": 4, "shards": shards}
    torch.save({**state, "fairseq_moe": manifest}, old)
    if command == "train":
        result = train(text_data, tmp_path / "new", "--restore-file", old, "--max-update", "6")
    else:
        argv = [text_data, "--user-dir", USER_DIR, "--cpu", "--path", old, "--gen-subset", "valid"]
        result = run_cli("fairseq_cli.eval_lm", argv)
    assert set(result.exit_codes) == {2}, result.output
    said = [line for line in result.output.splitlines() if "fairseq_moe: error" in line]
    assert len(said) == 1, result.output
    assert f"{old} has checkpoint format 1 (dense tensors in the main file" in said[0]
    assert "Traceback" not in result.output


def test_retention_deletes_the_sets_that_no_file_names(text_data: Path, tmp_path: Path) -> None:
    flags = ["--save-interval-updates", "1", "--keep-interval-updates", "2", "--max-update", "5"]
    assert train(text_data, tmp_path, *flags).exit_code == 0
    mains = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert mains == ["checkpoint_1_4.pt", "checkpoint_1_5.pt", "checkpoint_last.pt"]
    named = {contents_set(tmp_path / main) for main in mains}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == named


def contents_set(main: Path) -> str:
    return str(Path(manifest_of(main)["shards"][0]["file"]).parent.name)
