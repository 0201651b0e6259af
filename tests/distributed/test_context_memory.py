"""A rank of four context ranks keeps a quarter of a long sequence for its backward pass, and little else.

Counted: the storages that autograd keeps after one forward pass, each once, parameters left out. The layout beside it
has the same spread of experts, and a sequence for every rank. Run with
``pytest tests/distributed/test_context_memory.py``.
"""

from typing import Any

import pytest
import torch

from tests.helpers.block_models import MODELS
from tests.helpers.kept_bytes import kept_bytes
from tests.helpers.ranks import run_ranks

RANKS = 4
LENGTH = 1024
AT_MOST = 0.27
C4 = ("--context-parallel-size", RANKS)
_SIZES = (
    "--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64, "--moe-ffn-hidden-size", 32, "--num-experts", 8,
    "--tokens-per-sample", LENGTH,
)  # fmt: skip
# Without biases: drawing them changes the routers' weights, and by luck some ranks then have more rows than others.
_EVEN = tuple(flag for flag in MODELS["grouped"] if flag not in ("--moe-router-bias", "--gated-ffn-bias"))
MODEL_FLAGS: dict[str, tuple[Any, ...]] = {
    "stock's blocks": (
        "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
        "--moe-layer-freq", "[0,1]", *_SIZES,
    ),
    "grouped": (*_EVEN, *_SIZES, "--decoder-head-dim", 8),
    "latent": (*MODELS["latent"], *_SIZES, "--mtp-layers", 0, "--mtp-loss-weight", 0, "--decoder-attention-heads", 4),
}  # fmt: skip


def _report(rank: int, models: list[tuple[Any, ...]], layouts: list[tuple[Any, ...]]) -> list[list[int]]:
    """Count the bytes that this rank keeps, for each model and layout."""
    from fairseq import tasks

    import tests.helpers.tiny as tiny
    from fairseq_moe.distributed import broadcast_value

    found = []
    for model_flags in models:
        found.append([])
        for layout in layouts:
            cfg = broadcast_value(tiny._config((*model_flags, *layout)) if rank == 0 else None)
            task = tasks.setup_task(cfg.task)
            torch.manual_seed(1)
            model, criterion = task.build_model(cfg.model).train(), task.build_criterion(cfg.criterion)
            sample = tiny.make_batch(0 if layout else rank, num_sequences=1, length=LENGTH)
            found[-1].append(kept_bytes(model, criterion, sample))
    return found


@pytest.fixture(scope="module")
def kept() -> dict[str, tuple[list[int], list[int]]]:
    """Bytes that each rank keeps: with a sequence for every rank, and with one for all four."""
    reports = run_ranks(_report, RANKS, list(MODEL_FLAGS.values()), [(), C4], timeout=90.0)
    return {
        name: ([report[index][0] for report in reports], [report[index][1] for report in reports])
        for index, name in enumerate(MODEL_FLAGS)
    }


@pytest.mark.parametrize("name", MODEL_FLAGS)
def test_each_of_four_context_ranks_keeps_a_quarter(
    name: str, kept: dict[str, tuple[list[int], list[int]]]
) -> None:
    alone, shared = kept[name]
    assert min(alone) > 1_000_000  # something was counted
    assert max(shared) <= AT_MOST * sum(alone) / RANKS, f"{max(shared) * RANKS / sum(alone):.3f}"
