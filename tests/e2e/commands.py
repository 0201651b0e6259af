"""Run the commands that the end-to-end tests share: a tiny model, trained and evaluated in forked processes."""

import json
import re
from pathlib import Path
from typing import Any

from tests.helpers.ranks import USER_DIR, CommandResult, run_cli

__all__ = [
    "BASE",
    "DENSE",
    "EXPERTS",
    "MOE",
    "PLUGIN",
    "eval_lm",
    "eval_lm_argv",
    "json_lines",
    "perplexity",
    "train",
    "train_argv",
]

PLUGIN = ["--user-dir", USER_DIR]
BASE = [
    *("--cpu", "--num-workers", "0", "--seed", "5", "--log-format", "json", "--log-interval", "1"),
    *("--required-batch-size-multiple", "1"),  # stock leaves out batches that are no multiple
]
DENSE = [
    *("--task", "language_modeling", "--tokens-per-sample", "32", "--sample-break-mode", "none"),
    *("--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed", "--decoder-layers", "2"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2"),
    *("--optimizer", "adam", "--lr", "0.01", "--batch-size", "4", "--ddp-backend", "legacy_ddp"),
]
EXPERTS = ["--moe-freq", "2", "--moe-expert-count", "4", "--moe-gating-use-fp32"]
MOE = [*EXPERTS, "--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01"]


def train_argv(data: Path, save_dir: Path, *flags: Any, model: list[str] = DENSE + MOE) -> list[Any]:
    """Make arguments of fairseq-train for 4 updates of the tiny model, the plugin's --user-dir included."""
    return [data, *PLUGIN, *BASE, *model, "--max-update", "4", "--save-dir", save_dir, *flags]


def train(data: Path, save_dir: Path, *flags: Any, world_size: int = 1, **kwargs: Any) -> CommandResult:
    """Run fairseq-train in forked processes; the result's exit code is 0.

    Args:
        data: as ``text_data``.
        save_dir: --save-dir.
        flags: more of them.
        world_size: ranks, started as torchrun starts them.
        kwargs: of ``train_argv``.
    """
    result = run_cli("fairseq_cli.train", train_argv(data, save_dir, *flags, **kwargs), world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    return result


def eval_lm_argv(data: Path, checkpoint: Path, *flags: Any, plugin: bool = True) -> list[Any]:
    """Make arguments of fairseq-eval-lm on the ``valid`` split, one block per batch."""
    argv = [data, *(PLUGIN if plugin else []), "--cpu", "--num-workers", "0", "--path", checkpoint]
    argv += ["--task", "language_modeling", "--tokens-per-sample", "32", "--sample-break-mode", "none"]
    return [*argv, "--gen-subset", "valid", "--batch-size", "1", *flags]


def eval_lm(
    data: Path, checkpoint: Path, *flags: Any, world_size: int = 1, plugin: bool = True
) -> CommandResult:
    """Run fairseq-eval-lm in forked processes; the result's exit code is 0. Arguments as ``eval_lm_argv``."""
    argv = eval_lm_argv(data, checkpoint, *flags, plugin=plugin)
    result = run_cli("fairseq_cli.eval_lm", argv, world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    return result


def perplexity(result: CommandResult) -> float:
    """Parse the perplexity that fairseq-eval-lm printed, to two decimals."""
    found = re.findall(r"Perplexity: ([\d.]+)", result.outputs[0])
    assert len(found) == 1, result.output[-3000:]
    return float(found[0])


def json_lines(result: CommandResult, name: str) -> list[dict[str, str]]:
    """Parse the records that the logger ``name`` (train_inner, train, valid) of rank 0 printed; at least one."""
    pattern = rf"\| {name} \| (\{{.*\}})"
    found = [json.loads(line) for line in re.findall(pattern, result.outputs[0])]
    assert found, f"rank 0 printed no record of {name}: {result.outputs[0][-3000:]}"
    return found
