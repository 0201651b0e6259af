"""Converted models under every backend: each loads what from-hf wrote, and begins with transformers' loss.

Run with ``pytest tests/distributed/test_converted_backends.py``.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch

from fairseq_moe.convert.from_hf import from_hf
from tests.helpers.hf import HF_MODELS, add_prediction_block, import_transformers
from tests.helpers.ranks import run_ranks

Models = Callable[..., Path]
BACKENDS = ("legacy_ddp", "pytorch_ddp", "fully_sharded")
FLAGS = (
    "--task language_modeling --tokens-per-sample 16 --batch-size 2 --criterion moe_cross_entropy --optimizer adam "
    "--lr 0.001 --dropout 0 --seed 3 --cpu --distributed-backend gloo --clip-norm 0"
)


def first_losses(rank: int, models: Sequence[Path], world_size: int) -> dict[str, list[dict[str, float]]]:
    """Log the first update of each model under each backend; rank r has its own batch."""
    from tests.helpers.tiny import make_batch, update

    found = {}
    for model in models:
        cfg = _config(model, world_size)
        logged = []
        for backend in BACKENDS:
            for setting in ("restore_file", "finetune_from_model"):
                trainer = _trainer(cfg, rank, backend, {setting: str(model / "checkpoint.pt")})
                trainer.load_checkpoint(str(model / "checkpoint.pt"), True, True, None, True)
                logged.append(update(trainer, [make_batch(7 + rank)]))
        _check_that_other_buffers_are_needed(trainer)
        found[model.name] = logged
    return found


def _check_that_other_buffers_are_needed(trainer: Any) -> None:
    from fairseq_moe.errors import CheckpointError
    from fairseq_moe.stock.sharding.fsdp_state import FairscaleState, load_full_model_state

    state = FairscaleState(trainer).model_tensors()
    for name in [name for name in state if name.endswith("expert_bias")]:
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            load_full_model_state(trainer.model, {key: state[key] for key in state if key != name})


def _config(model: Path, world_size: int) -> Any:
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_moe  # noqa: F401

    lines = (model / "flags.txt").read_text().splitlines()
    flags = [part for line in lines for part in line.split(" ", 1)]
    save_dir = ["--save-dir", str(model / "saves"), "--distributed-world-size", str(world_size)]
    argv = [str(model), *split(FLAGS), *save_dir, *flags]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), argv))


def _trainer(cfg: Any, rank: int, backend: str, checkpoint: dict[str, str]) -> Any:
    from fairseq import tasks
    from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
    from fairseq.trainer import Trainer

    cfg = deepcopy(cfg)
    cfg.distributed_training.distributed_rank = rank
    cfg.distributed_training.ddp_backend = backend
    cfg.checkpoint.update(checkpoint)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(cfg.common.seed)
    if backend == "fully_sharded":
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(task.build_model(cfg.model))
    else:
        model = task.build_model(cfg.model)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def _reference(source: Path, seeds: Sequence[int]) -> float:
    """Compute transformers' mean loss in bits over these batches."""
    from tests.helpers.tiny import make_batch

    model = import_transformers().AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for seed in seeds:
        batch = make_batch(seed)
        with torch.no_grad():
            logits = model(batch["net_input"]["src_tokens"]).logits
        target = batch["target"].reshape(-1)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum"))
        count += len(target)
    return total / count / math.log(2)


def _check(sources: dict[str, Path], folder: Path, world_size: int) -> None:
    for name, source in sources.items():
        from_hf(source, folder / name, expert_parallel_size=2)
    models = [folder / name for name in sources]
    by_rank = run_ranks(first_losses, world_size, models, world_size, timeout=100.0)
    for name, source in sources.items():
        expected = _reference(source, [7 + rank for rank in range(world_size)])
        for found in by_rank:
            assert [logged["inner_loss"] for logged in found[name]] == pytest.approx([expected] * 6, rel=1e-5)
            losses = [logged["loss"] for logged in found[name]]
            assert losses == pytest.approx(losses[:1] * 6, rel=1e-6), name


def test_every_family_begins_with_the_same_loss_under_every_backend(hf_model: Models, tmp_path: Path) -> None:
    sources = {name: hf_model(name) for name in HF_MODELS}
    sources["prediction_block"] = add_prediction_block(hf_model("deepseek_v3"), tmp_path / "source")
    sources["tied"] = hf_model("olmoe", config_tie_word_embeddings=True)
    _check(sources, tmp_path / "models", 1)


def test_two_ranks_begin_with_the_same_loss_under_every_backend(hf_model: Models, tmp_path: Path) -> None:
    sources = {"mixtral": hf_model("mixtral")}
    sources["prediction_block"] = add_prediction_block(hf_model("deepseek_v3"), tmp_path / "source")
    _check(sources, tmp_path / "models", 2)
