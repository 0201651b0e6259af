"""Training with experts in emulated FP8: losses are near those without. Shards: ``tests/distributed/test_fp8.py``."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import DENSE, MOE, json_lines, train, train_argv
from tests.helpers.ranks import run_cli

# The demo's model (scripts/demo.py), on smaller batches.
DEMO = [
    *("--task", "language_modeling", "--tokens-per-sample", "64", "--sample-break-mode", "none"),
    *("--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed", "--decoder-layers", "4"),
    *("--decoder-embed-dim", "128", "--decoder-ffn-embed-dim", "512", "--decoder-attention-heads", "4"),
    *("--dropout", "0", "--attention-dropout", "0", "--batch-size", "4", "--optimizer", "adam"),
    *("--lr", "0.002", "--clip-norm", "1.0", "--ddp-backend", "legacy_ddp", "--disable-validation"),
    *("--moe-freq", "2", "--moe-expert-count", "8", "--moe-gating-use-fp32"),
    *("--moe-second-expert-policy", "all", "--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01"),
]


def losses(text_data: Path, save_dir: Path, *flags: Any, model: list[str], **kwargs: Any) -> list[float]:
    result = train(text_data, save_dir, *flags, model=model, **kwargs)
    return [float(record["loss"]) for record in json_lines(result, "train_inner")]


@pytest.mark.slow
def test_the_demos_model_learns_as_without(text_data: Path, tmp_path: Path) -> None:
    found = {}
    for name, flags in {"plain": (), "fp8": ("--moe-fp8", "emulate")}.items():
        flags = (*flags, "--max-update", "60")
        found[name] = losses(text_data, tmp_path / name, *flags, model=DEMO)
    plain, fp8 = found["plain"], found["fp8"]
    assert len(plain) == len(fp8) == 60 and plain[-1] < 0.7 * plain[0]
    assert plain != fp8
    last = slice(50, 60)
    assert sum(fp8[last]) == pytest.approx(sum(plain[last]), rel=0.01)


def test_half_precision_and_dropped_activations(text_data: Path, tmp_path: Path) -> None:
    model = [*DENSE, *MOE, "--bf16", "--activation-dropout", "0.1", "--disable-validation"]
    plain = losses(text_data, tmp_path / "plain", model=model)
    found = losses(text_data, tmp_path / "fp8", "--moe-fp8", "emulate", model=model)
    assert found != plain and found == pytest.approx(plain, rel=0.01)


def test_a_resumed_run_may_change_its_mind(text_data: Path, tmp_path: Path) -> None:
    train(text_data, tmp_path, "--moe-fp8", "emulate", "--max-update", "2")
    result = train(text_data, tmp_path, "--max-update", "4")
    assert "--moe-fp8 emulate -> None" in result.output
    again = train(text_data, tmp_path, "--moe-fp8", "emulate", "--max-update", "6")
    assert "experts are multiplied in emulated FP8" in again.output


def test_native_is_refused_where_there_is_none(text_data: Path, tmp_path: Path) -> None:
    result = run_cli("fairseq_cli.train", train_argv(text_data, tmp_path, "--moe-fp8", "native"))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "--moe-fp8 native cannot be honoured: " in result.output
