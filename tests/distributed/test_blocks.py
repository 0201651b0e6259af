"""Models of modern blocks on 1, 2 and 4 ranks under every backend: the same losses, gradients and step.

Run with ``pytest tests/distributed/test_blocks.py``.
"""

import functools
from typing import Any

import pytest
import torch

from tests.helpers.block_models import MODELS
from tests.helpers.ranks import run_ranks
from tests.helpers.updates import BATCHES, assert_equal

BACKENDS = ["legacy_ddp", "pytorch_ddp", "fully_sharded"]


def _report(rank: int, flags: list[Any], numbers: list[int]) -> dict[str, Any]:
    from tests.helpers.tiny import build_trainer, gradients, make_batch, parameters, update

    trainer = build_trainer(flags)
    batches = [
        make_batch(seed, num_sequences=num, length=length)
        for seed, num, length in (BATCHES[number] for number in numbers)
    ]
    logged = update(trainer, batches)
    return {"logged": logged, "gradients": gradients(trainer), "parameters": parameters(trainer)}


def _on_rank(rank: int, flags: list[Any]) -> dict[str, Any]:
    return _report(rank, flags, [rank])


@functools.cache
def alone(flags: tuple[Any, ...], num_ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(_report, 1, list(flags), list(range(num_ranks)))[0]
    return found


@pytest.mark.parametrize(
    ("world_size", "backend"), [(2, "legacy_ddp"), *((4, backend) for backend in BACKENDS)]
)
@pytest.mark.parametrize("name", MODELS)
def test_ranks_equal_one_process_with_their_micro_batches(name: str, world_size: int, backend: str) -> None:
    flags = MODELS[name]
    expected = alone(flags, world_size)
    assert expected["logged"]["gnorm"] > 0 and ("mtp_loss" in expected["logged"]) is (name == "latent")
    for found in run_ranks(_on_rank, world_size, [*flags, "--ddp-backend", backend]):
        assert_equal(found, expected, relative=1e-5, of_norm=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    flags = [*MODELS[name], "--dropout", 0.3]
    expected, found = (
        run_ranks(_on_rank, 2, [*flags, *more])[0] for more in ([], ["--checkpoint-activations"])
    )
    for key, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][key], gradient, msg=key)


def _size(rank: int, flags: list[Any]) -> Any:
    from tests.helpers.tiny import build_trainer

    return build_trainer(flags).get_model().decoder.size


@pytest.mark.parametrize("name", MODELS)
def test_size_is_that_of_the_whole_model_wherever_it_lies(name: str) -> None:
    (alone,) = run_ranks(_size, 1, list(MODELS[name]))
    sharded = ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", 1]
    assert run_ranks(_size, 2, [*MODELS[name], *sharded]) == [alone, alone]
    assert alone.total > alone.active > alone.active_without_embedding - 1 and bool(alone.mtp) is (
        name == "latent"
    )


def _losses(rank: int, flags: list[Any]) -> list[float]:
    from tests.helpers.tiny import build_trainer, make_batch, update

    trainer = build_trainer(["--optimizer", "adam", "--lr", 0.01, *flags])
    return [update(trainer, [make_batch(rank)])["loss"] for _ in range(6)]


@pytest.mark.parametrize("precision", ["--memory-efficient-fp16", "--bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_trains_as_float32(name: str, precision: str) -> None:
    flags = [*MODELS[name], "--init-std", 0.05]
    expected, found = (run_ranks(_losses, 2, [*flags, *more])[0] for more in ([], [precision]))
    assert expected[-1] < 0.97 * expected[0]
    assert found == pytest.approx(expected, rel=0.01)


def test_frozen_blocks_of_mtp_train_with_any_backend() -> None:
    flags = [*MODELS["latent"], "--mtp-loss-weight", 0.0, "--ddp-backend", "pytorch_ddp"]
    logged = run_ranks(_frozen, 2, flags)[0]
    assert logged["loss"] > 0


def _frozen(rank: int, flags: list[Any]) -> dict[str, float]:
    from tests.helpers.tiny import build_trainer, make_batch, update

    trainer = build_trainer(flags)
    before = {key: value.clone() for key, value in trainer.get_model().decoder.mtp.state_dict().items()}
    for seed in (0, 1):
        logged = update(trainer, [make_batch(seed)])
    after = trainer.get_model().decoder.mtp.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    return logged
