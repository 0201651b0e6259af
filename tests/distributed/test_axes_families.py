"""Every converted family on tensor, context and pipeline ranks: one update, and from one of these back to Hugging Face.

Run with ``pytest tests/distributed/test_axes_families.py``. One start of two ranks trains all of them, and one process
does the same update; what comes back is computed by transformers, too.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.convert.verify import verify
from tests.helpers.hf import HF_MODELS, add_prediction_block, mean_loss_bits
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Models = Callable[..., Path]
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "T2": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "C2": ("--context-parallel-size", 2),
    "P2": ("--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 1),
}
# A large epsilon: otherwise Adam turns the rounding of vanishing gradients into whole steps.
TRAINING = ("--ddp-backend", "legacy_ddp", "--lr", 0.01, "--adam-eps", 1e-3)
LOGGED = ("loss", "inner_loss", "gnorm", "moe_aux_loss", "drop_rate")
NAMES = (*HF_MODELS, "prediction block", "tied")
IN_DOUBLE = 1e-11
# These routers compute in float32 whatever the model does.
IN_FLOAT32 = ("deepseek", "dots", "ernie", "glm", "hunyuan", "minimax", "prediction block")
BOUNDS = {name: 1e-6 for name in NAMES if any(part in name for part in IN_FLOAT32)}


def batches() -> list[Any]:
    """Two micro-batches, which all ranks read; two ranks do not divide their lengths evenly."""
    from tests.helpers.tiny import make_batch

    return [make_batch(7, length=9), make_batch(8, num_sequences=3, length=6)]


def save(trainer: Any) -> None:
    from fairseq import checkpoint_utils

    position = SimpleNamespace(
        epoch=1,
        end_of_epoch=lambda: False,
        state_dict=lambda: {"epoch": 1, "iterations_in_epoch": 1},
    )
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, position, None)


def layouts_back(name: str) -> list[str]:
    """Choose from which layouts a model is given back: each layout has a third of the models, and prediction blocks."""
    layouts = list(LAYOUTS)
    return layouts if name == "prediction block" else [layouts[NAMES.index(name) % len(layouts)]]


def train(
    model: Path, folder: Path, rank: int, world_size: int, flags: tuple[Any, ...], is_saved: bool
) -> dict[str, Any]:
    """Do one update in float64, whose parameters are returned, and, to be saved, one in float32.

    The latter begins as a run that goes on, the other as one that takes a model alone.
    """
    from tests.helpers.converted import build_converted, converted_config
    from tests.helpers.tiny import parameters, update

    cfg = converted_config(model, world_size, [*TRAINING, *flags])
    source, save_dir = str(model / "checkpoint.pt"), str(folder / model.name)
    found = {}
    in_float32 = [(torch.float32, "restore_file")] if is_saved else []
    for dtype, setting in (*in_float32, (torch.float64, "finetune_from_model")):
        trainer = build_converted(cfg, rank, {setting: source, "save_dir": save_dir}, dtype=dtype)
        trainer.load_checkpoint(source, True, True, None, True)
        found[dtype] = update(trainer, batches())
        if dtype == torch.float32:
            save(trainer)
    logged = found[torch.float64]
    return {
        "inner_loss": logged["inner_loss"],
        "logged": {name: value for name, value in logged.items() if name in LOGGED},
        "parameters": parameters(trainer),
    }


def train_all(rank: int, models: list[Path], folders: dict[Path, tuple[Any, ...]], world_size: int) -> Any:
    return {
        (model.name, folder.name): train(
            model, folder, rank, world_size, flags, folder.name in ("alone", *layouts_back(model.name))
        )
        for model in models
        for folder, flags in folders.items()
    }


class Trained:
    """What was trained, by whom, and where it lies."""

    def __init__(self, folder: Path, hf_model: Models) -> None:
        self.folder = folder
        self.sources = {name: hf_model(name) for name in HF_MODELS}
        self.sources["prediction block"] = add_prediction_block(hf_model("deepseek_v3"), folder / "source")
        self.sources["tied"] = hf_model("olmoe", config_tie_word_embeddings=True)
        models = []
        for name, source in self.sources.items():
            models.append(folder / "models" / name)
            from_hf(source, models[-1], expert_parallel_size=2)
        layouts = {folder / name: flags for name, flags in LAYOUTS.items()}
        self.by_rank = run_ranks(train_all, 2, models, layouts, 2, timeout=550)
        (self.alone,) = run_ranks(train_all, 1, models, {folder / "alone": ()}, 1, timeout=550)

    def checkpoint(self, name: str, layout: str) -> Path:
        return self.folder / layout / name / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, hf_model: Models) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), hf_model)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor.double()).norm()
        assert difference <= bound * tensor.double().norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_that_of_one_process(name: str, layout: str, trained: Trained) -> None:
    expected = trained.alone[name, "alone"]
    source = trained.sources["deepseek_v3" if name == "prediction block" else name]
    assert expected["inner_loss"] == pytest.approx(mean_loss_bits(source, batches()), rel=1e-5)
    assert expected["logged"]["drop_rate"] == 0
    bound = BOUNDS.get(name, IN_DOUBLE)
    for found in trained.by_rank:
        assert found[name, layout]["logged"] == pytest.approx(expected["logged"], rel=bound)
        assert_close(found[name, layout]["parameters"], expected["parameters"], bound)


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in NAMES for layout in layouts_back(name)]
)
def test_it_is_given_back_to_hugging_face(name: str, layout: str, trained: Trained, tmp_path: Path) -> None:
    to_hf(trained.checkpoint(name, "alone"), tmp_path / "alone")
    done = to_hf(trained.checkpoint(name, layout), tmp_path / layout)
    assert "are others than those of the model it came from" in done.notes[0]
    found, expected = (load_all(tmp_path / each) for each in (layout, "alone"))
    assert_close(found, expected, 1e-5)
    source = load_all(trained.sources[name])
    assert found.keys() == source.keys()
    changed = {key for key, tensor in source.items() if not torch.equal(found[key], tensor)}
    frozen = {key for key in source if key.startswith("model.layers.3.")} if "block" in name else set()
    kept = {key for key in frozen if "embed_tokens" not in key and "shared_head.head" not in key}
    assert changed == source.keys() - kept
    if name != "prediction block":  # which transformers does not read
        assert "verified" in verify(tmp_path / layout, trained.checkpoint(name, layout))


def go_on(rank: int, model: Path, start: Path, flags: tuple[Any, ...]) -> dict[str, Any]:
    """Do one more update on one process; tell which parameters of prediction blocks it changes."""
    from tests.helpers.converted import build_converted, converted_config
    from tests.helpers.tiny import parameters, update

    cfg = converted_config(model, 1, [*TRAINING, *flags])
    trainer = build_converted(cfg, rank, {"restore_file": str(start)})
    trainer.load_checkpoint(str(start))
    before = parameters(trainer)
    logged, after = update(trainer, batches()), parameters(trainer)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    return {"updates": trainer.get_num_updates(), "loss": logged.get("mtp_loss"), "changed": changed}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prediction_blocks_wait_frozen_and_are_trained_afterwards(layout: str, trained: Trained) -> None:
    """Their loss is refused while ranks share micro-batches; without --mtp-loss-weight they are kept as they are."""
    name = "prediction block"
    model, start = trained.folder / "models" / name, trained.checkpoint(name, layout)
    (frozen,) = run_ranks(go_on, 1, model, start, ())
    (found,) = run_ranks(go_on, 1, model, start, ("--mtp-loss-weight", 0.3))
    assert frozen["updates"] == found["updates"] == 2
    assert frozen["loss"] is None and found["loss"] > 0
    assert not any(".mtp." in each for each in frozen["changed"])
    assert any(".mtp.0.layer.self_attn" in each for each in found["changed"])
    assert any(".mtp.0.layer.moe_layer.experts" in each for each in found["changed"])


def load_all(directory: Path) -> dict[str, Tensor]:
    return {
        key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()
    }
