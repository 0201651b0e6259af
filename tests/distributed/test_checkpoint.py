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
from tests.helpers.ranks import USER_DIR, CommandResult, run_cli, run_ranks

MODEL = [
    "--task", "language_modeling", "--tokens-per-sample", "32", "--sample-break-mode", "none",
    "--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed", "--decoder-layers", "2",
    "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2",
    "--moe-freq", "2", "--moe-expert-count", "4", "--criterion", "moe_cross_entropy",
]  # fmt: skip
TRAINING = [
    "--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--lr", "0.01", "--lr-scheduler", "inverse_sqrt",
    "--warmup-updates", "4", "--dropout", "0.1", "--batch-size", "2", "--num-workers", "0", "--seed", "3",
    "--cpu",
    "--required-batch-size-multiple", "1", "--disable-validation", "--log-format", "json", "--log-interval",
    "1", "--no-epoch-checkpoints",
]  # fmt: skip


def train(data: Path, save_dir: Path, *flags: Any, world_size: int = 2) -> CommandResult:
    argv = [data, "--user-dir", USER_DIR, *MODEL, *TRAINING, "--save-dir", save_dir, *flags]
    return run_cli("fairseq_cli.train", argv, world_size=world_size)


def load_and_save(rank: int, argv: list[str]) -> int:
    """Load a checkpoint into a trainer of this layout and save it again; returns the update count."""
    from fairseq import checkpoint_utils, options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
    from fairseq.trainer import Trainer

    import fairseq_moe  # noqa: F401

    cfg = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), input_args=argv)
    )
    task = tasks.setup_task(cfg.task)
    if cfg.distributed_training.ddp_backend == "fully_sharded":
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(task.build_model(cfg.model))
    else:
        model = task.build_model(cfg.model)
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    _, epoch_itr = checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)
    epoch_itr.next_epoch_itr()
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    return trainer.get_num_updates()


def resave(
    data: Path, source: Path, save_dir: Path, *, world_size: int, backend: str, extra: Any = ()
) -> list[int]:
    argv = [
        str(data), *MODEL, *TRAINING, "--restore-file", str(source), "--save-dir", str(save_dir),
        "--ddp-backend", backend, "--distributed-world-size", str(world_size), *extra,
    ]  # fmt: skip
    return run_ranks(load_and_save, world_size, argv)


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


@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded"])
def test_replicated_experts_are_written_once(text_data: Path, tmp_path: Path, backend: str) -> None:
    few = ["--moe-expert-count", "2"]
    assert train(text_data, tmp_path / "one", "--max-update", "2", *few, world_size=1).exit_code == 0
    source = tmp_path / "one" / "checkpoint_last.pt"
    resave(text_data, source, tmp_path / "four", world_size=4, backend=backend, extra=few)
    main = tmp_path / "four" / "checkpoint_last.pt"
    assert sorted(shard["expert_ids"] for shard in manifest_of(main)["shards"]) == [[], [], [0], [1]]
    assert_same(contents(tmp_path / "four" / "checkpoint_last.pt"), contents(source))


def test_resumed_training_continues_bit_for_bit(trained: Path, text_data: Path, tmp_path: Path) -> None:
    assert train(text_data, tmp_path / "whole", "--max-update", "6").exit_code == 0
    shutil.copytree(trained, tmp_path / "halves")
    assert train(text_data, tmp_path / "halves", "--max-update", "6").exit_code == 0
    whole, halves = (contents(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "halves"))
    assert_same(halves, whole)


def test_flags_that_fairseq_saves_in_a_namespace_load_again(text_data: Path, tmp_path: Path) -> None:
    argv = [text_data, "--user-dir", USER_DIR, *MODEL, *TRAINING, "--save-dir", tmp_path]
    position = argv.index("--adam-betas")
    del argv[position : position + 2]
    for updates in ("1", "2"):
        flags = ["--optimizer", "sgd", "--max-update", updates]
        result = run_cli("fairseq_cli.train", [*argv, *flags])
        assert result.exit_code == 0, result.output
    assert "(1 updates)" in result.output


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("pattern", "damage", "said"),
    [
        ("shards/*/shard-1-of-2.safetensors", Path.unlink, "is missing"),
        ("shards/*/shard-1-of-2.safetensors", _flip, "it is damaged"),
        ("shards/*/shard-0-of-2.safetensors", _cut, "it is damaged"),
        ("checkpoint_last.pt", _cut, "cannot read checkpoint file"),
    ],
)
def test_damage_is_named_by_one_sentence_and_no_rank_trains(
    trained: Path, text_data: Path, tmp_path: Path, pattern: str, damage: Any, said: str
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (damaged,) = (tmp_path / "copy").glob(pattern)
    damage(damaged)
    result = train(text_data, tmp_path / "copy", "--max-update", "6")
    assert result.exit_codes == [2, 2]
    sentences = [line for line in result.output.splitlines() if "fairseq_moe: error" in line]
    assert len(sentences) == 1, result.output
    assert said in sentences[0]
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


def test_a_missing_restore_file_is_an_error(text_data: Path, tmp_path: Path) -> None:
    result = train(text_data, tmp_path / "new", "--restore-file", tmp_path / "no.pt", "--max-update", "1")
    assert result.exit_codes == [2, 2]
    assert result.output.count("fairseq_moe: error") == 1
    assert f"--restore-file {tmp_path / 'no.pt'} does not exist" in result.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--moe-expert-count", "8"], "--moe-expert-count is 4 in the checkpoint and 8 in this run"),
        (["--decoder-layers", "4"], "--decoder-layers is 2 in the checkpoint and 4 in this run"),
        (["--moe-freq", "1"], "--moe-freq is 2 in the checkpoint and 1 in this run"),
        (["--moe-expert-ffn-dim", "8"], "--moe-expert-ffn-dim is 32 in the checkpoint and 8 in this run"),
        (
            ["--moe-freq", "0", "--moe-expert-count", "0"],
            "--moe-freq is 2 in the checkpoint and 0 in this run",
        ),
        (["--optimizer", "sgd"], "--optimizer"),
    ],
)
def test_a_checkpoint_of_another_model_names_both_values(
    trained: Path, text_data: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    argv = [
        text_data,
        "--user-dir",
        USER_DIR,
        *MODEL,
        *TRAINING,
        "--save-dir",
        tmp_path / "new",
        "--max-update",
        "6",
    ]
    if "sgd" in flags:
        position = argv.index("--adam-betas")
        del argv[position : position + 2]
    result = run_cli("fairseq_cli.train", [*argv, *flags, "--restore-file", trained / "checkpoint_last.pt"])
    assert result.exit_code == 2, result.output
    assert said in result.output
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
