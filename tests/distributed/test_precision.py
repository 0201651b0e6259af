"""Half precision on CPU: training works, ranks stay equal, an overflow is skipped by all.

Run with ``pytest tests/distributed/test_precision.py``.
"""

import functools
from typing import Any

import pytest
import torch

from tests.helpers.ranks import RankError, run_ranks

PRECISIONS = {
    "fp16": ["--fp16", "--fp16-no-flatten-grads"],
    "memory-efficient-fp16": ["--memory-efficient-fp16"],
    "bf16": ["--bf16"],
    "memory-efficient-bf16": ["--memory-efficient-bf16"],
}
NUM_UPDATES = 8
ADAM = ["--optimizer", "adam", "--lr", 0.01, "--clip-norm", 1.0]


def _train(rank: int, flags: list[Any]) -> dict[str, Any]:
    from fairseq_moe.distributed import gather_values
    from tests.helpers.tiny import build_trainer, make_batch, parameters, update

    trainer = build_trainer([*ADAM, "--moe-expert-count", 2, "--moe-gating-use-fp32", *flags])
    losses = [update(trainer, [make_batch(rank)])["loss"] for _ in range(NUM_UPDATES)]
    scaler = getattr(trainer.optimizer, "scaler", None)
    assert len(set(gather_values(getattr(scaler, "loss_scale", None)))) == 1
    after = parameters(trainer)  # compares the ranks' copies, bit by bit
    return {"losses": losses, "dtypes": {tensor.dtype for name, tensor in after.items() if "weight" in name}}


@functools.cache
def _losses_in_fp32(world_size: int) -> list[float]:
    losses: list[float] = run_ranks(_train, world_size, ["--ddp-backend", "legacy_ddp"])[0]["losses"]
    return losses


@pytest.mark.parametrize(
    ("precision", "world_size", "backend"),
    [
        *((precision, world_size, "legacy_ddp") for precision in PRECISIONS for world_size in (1, 2)),
        ("fp16", 4, "pytorch_ddp"),  # two experts: each is held twice
        ("bf16", 4, "pytorch_ddp"),
    ],
)
def test_loss_falls_as_in_fp32_and_ranks_stay_equal(precision: str, world_size: int, backend: str) -> None:
    expected = _losses_in_fp32(world_size)
    assert expected[-1] < 0.8 * expected[0]
    by_rank = run_ranks(_train, world_size, [*PRECISIONS[precision], "--ddp-backend", backend])
    for found in by_rank:
        assert found["losses"] == by_rank[0]["losses"]
        assert found["losses"] == pytest.approx(expected, rel=0.01)
        assert found["dtypes"] == {torch.float16 if "fp16" in precision else torch.bfloat16}


def _overflow(rank: int, flags: list[Any], mutation: bool = False) -> dict[str, Any]:
    """Start with a loss scale at which every gradient overflows."""
    from tests.helpers.tiny import build_trainer, make_batch, parameters, update

    trainer = build_trainer([*ADAM, "--fp16-scale-tolerance", 0.0, *flags])
    if mutation:
        import fairseq.trainer

        fairseq.trainer.torch = torch
    trainer.optimizer.scaler.loss_scale = 2.0**40
    before = parameters(trainer)
    skipped = 0
    while not update(trainer, [make_batch(rank)]):
        skipped += 1
        if trainer.get_num_updates() == 0:
            after = parameters(trainer)
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return {
        "skipped": skipped,
        "updates": trainer.get_num_updates(),
        "scale": trainer.optimizer.scaler.loss_scale,
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp16", "memory-efficient-fp16"])
def test_overflowing_updates_are_skipped_until_the_loss_scale_fits(precision: str, world_size: int) -> None:
    by_rank = run_ranks(_overflow, world_size, PRECISIONS[precision])
    for found in by_rank:
        assert found == by_rank[0]
        assert found["updates"] == 1
        assert 5 < found["skipped"] < 40
        assert found["scale"] == 2.0 ** (40 - found["skipped"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="stock's way works where there is CUDA")
def test_stock_dies_at_an_overflow_without_cuda() -> None:
    with pytest.raises(RankError, match=r"(?s)\.cuda\(\)"):
        run_ranks(_overflow, 1, PRECISIONS["fp16"], True)
