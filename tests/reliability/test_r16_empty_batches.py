"""R16: a rank without a batch, or with nothing but padding, changes nothing for the others, and all numbers are finite.

Whole updates under fairseq's Trainer with the losses and counters that look at all ranks. Outputs with and without the
rank, short last batches and whole epochs: ``tests/distributed/test_uneven_batches.py``.
"""

import functools
import math
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.router_family import GLOBAL, MEGATRON

BRANCH = ("--moe-expert-count", 6, "--use-moe-pad-mask")
FLAGS = {
    "branch": BRANCH,
    "neg_log": (*BRANCH, "--moe-gate-loss-transform", "neg_log"),
    "top-k": (*MEGATRON, *GLOBAL, "--num-experts", 6),
}
_TIMING = {"ups", "wps", "wall", "train_wall"}


def _padding(num_sequences: int, length: int) -> dict[str, Any]:
    """A batch of padding, as a task's collater would make it of empty sentences."""
    from tests.helpers.tiny import make_batch

    batch = make_batch(0, num_sequences=num_sequences, length=length)
    batch["net_input"]["src_tokens"].fill_(1)
    batch["target"].fill_(1)
    batch["net_input"]["src_lengths"].zero_()
    return {**batch, "ntokens": 0}


def _batch(rank: int, case: str) -> dict[str, Any]:
    """Ranks 0 and 2 have data of their own, rank 1 has what the case says."""
    from tests.helpers.tiny import make_batch

    if rank != 1:
        return make_batch(rank, num_sequences=1 + rank, length=6)
    return {} if case == "no batch" else _padding(3, 5)


def _updates(rank: int, flags: list[Any], cases: list[str], mutation: bool = False) -> list[dict[str, Any]]:
    from tests.helpers.tiny import build_trainer, gradients, make_batch, parameters, update

    if mutation:
        import fairseq_moe.stock.step.training as training

        training.moe_decoder = lambda model: None  # dummies are not marked
    found = []
    for case in cases:
        trainer = build_trainer(flags)
        trainer.reset_dummy_batch(make_batch(99, length=11))
        batch = _padding(2, 4) if case == "padding everywhere" else _batch(rank, case)
        logged = update(trainer, [batch])
        tensors = gradients(trainer) | parameters(trainer)
        valid = trainer.valid_step(batch) if case == "padding everywhere" else {}
        numbers = {
            name: value for name, value in logged.items() if name not in _TIMING and "time" not in name
        }
        found.append({"logged": numbers, "tensors": tensors, "valid": valid})
    return found


@functools.cache
def _on_ranks(kind: str) -> list[list[dict[str, Any]]]:
    cases = ["no batch", "padding only", "padding everywhere"]
    return run_ranks(_updates, 3, list(FLAGS[kind]), cases, timeout=60)


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tensor in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    for name in ("loss", "inner_loss", "gnorm", "sample_size"):
        assert found["logged"][name] == pytest.approx(expected["logged"][name], rel=1e-6), name


@pytest.mark.parametrize("kind", ["branch", "top-k"])
def test_a_batch_of_padding_is_as_good_as_none(kind: str) -> None:
    for nothing, padding, _ in _on_ranks(kind):
        _assert_same(padding, nothing)


@pytest.mark.parametrize("kind", FLAGS)
def test_padding_on_every_rank_gives_finite_numbers_and_no_step_to_speak_of(kind: str) -> None:
    for *_, everywhere in _on_ranks(kind):
        numbers = [*everywhere["logged"].values(), *everywhere["valid"].values()]
        assert all(math.isfinite(float(value)) for value in numbers), everywhere["logged"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in everywhere["tensors"].values())


def test_these_tests_see_tokens_of_a_dummy_that_count() -> None:
    nothing, padding = run_ranks(
        _updates, 3, list(FLAGS["top-k"]), ["no batch", "padding only"], True, timeout=60
    )[0]
    with pytest.raises(AssertionError):
        _assert_same(padding, nothing)
