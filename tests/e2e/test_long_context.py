"""The long-context command of docs/parallelism.md trains a tiny model on 4 ranks, validates and writes a checkpoint."""

from pathlib import Path

from tests.e2e.commands import BASE, json_lines
from tests.helpers.docs import documented_training
from tests.helpers.ranks import USER_DIR, run_cli

# What makes it tiny; the last one of a name counts. 37 positions do not divide: some are absent.
TINY = (
    "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 4, "--decoder-kv-heads", 2,
    "--decoder-head-dim", 4, "--moe-ffn-hidden-size", 8, "--num-experts", 8, "--moe-router-topk", 2,
    "--tokens-per-sample", 37, "--context-parallel-size", 2, "--expert-model-parallel-size", 4, "--max-update", 2,
)  # fmt: skip


def test_the_documented_command_trains(text_data: Path, tmp_path: Path) -> None:
    data, *documented = documented_training("parallelism.md")
    assert data == "data-bin" and "--context-parallel-size" in documented
    at = documented.index("--user-dir") + 1
    flags = [*documented[:at], USER_DIR, *documented[at + 1 :], *BASE, *TINY, "--save-dir", tmp_path]
    result = run_cli("fairseq_cli.train", [text_data, *flags], world_size=4)
    assert result.exit_code == 0, result.output[-3000:]
    first, second = (float(record["loss"]) for record in json_lines(result, "train_inner"))
    assert 0 < second < first + 1
    (valid,) = json_lines(result, "valid")
    assert float(valid["valid_loss"]) > 0
    assert (tmp_path / "checkpoint_last.pt").is_file()
