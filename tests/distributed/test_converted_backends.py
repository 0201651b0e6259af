"""Converted models under every backend: each loads what from-hf wrote, and begins with transformers' loss.

Run with ``pytest tests/distributed/test_converted_backends.py``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.convert.from_hf import from_hf
from tests.helpers.converted import build_converted, converted_config
from tests.helpers.hf import HF_MODELS, add_prediction_block, mean_loss_bits
from tests.helpers.ranks import run_ranks

Models = Callable[..., Path]
BACKENDS = ("legacy_ddp", "pytorch_ddp", "fully_sharded")


def first_losses(rank: int, models: Sequence[Path], world_size: int) -> dict[str, list[dict[str, float]]]:
    """Log the first update of each model under each backend; rank r has its own batch."""
    from tests.helpers.tiny import make_batch, update

    found = {}
    for model in models:
        cfg = converted_config(model, world_size)
        logged = []
        for backend in BACKENDS:
            for setting in ("restore_file", "finetune_from_model"):
                trainer = build_converted(cfg, rank, {setting: str(model / "checkpoint.pt")}, backend=backend)
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


def _reference(source: Path, seeds: Sequence[int]) -> float:
    from tests.helpers.tiny import make_batch

    return mean_loss_bits(source, map(make_batch, seeds))


def _check(sources: dict[str, Path], folder: Path, world_size: int) -> None:
    for name, source in sources.items():
        from_hf(source, folder / name, expert_parallel_size=2)
    models = [folder / name for name in sources]
    by_rank = run_ranks(first_losses, world_size, models, world_size, timeout=200.0)
    for name, source in sources.items():
        expected = _reference(source, [7 + rank for rank in range(world_size)])
        for found in by_rank:
            assert [logged["inner_loss"] for logged in found[name]] == pytest.approx([expected] * 6, rel=1e-5)
            losses = [logged["loss"] for logged in found[name]]
            assert losses == pytest.approx(losses[:1] * 6, rel=1e-6), name


@pytest.mark.timeout(300)
def test_every_family_begins_with_the_same_loss_under_every_backend(hf_model: Models, tmp_path: Path) -> None:
    sources = {name: hf_model(name) for name in HF_MODELS}
    sources["prediction_block"] = add_prediction_block(hf_model("deepseek_v3"), tmp_path / "source")
    sources["tied"] = hf_model("olmoe", config_tie_word_embeddings=True)
    _check(sources, tmp_path / "models", 1)


def test_two_ranks_begin_with_the_same_loss_under_every_backend(hf_model: Models, tmp_path: Path) -> None:
    sources = {"mixtral": hf_model("mixtral")}
    sources["prediction_block"] = add_prediction_block(hf_model("deepseek_v3"), tmp_path / "source")
    _check(sources, tmp_path / "models", 2)
