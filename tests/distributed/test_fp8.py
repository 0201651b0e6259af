"""Experts in emulated FP8 on ranks, on shards and computed again: what is quantised is what was gathered.

Run with ``pytest tests/distributed/test_fp8.py``. Products alone are in ``tests/unit/modules/test_fp8.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.router_family import MEGATRON
from tests.helpers.updates import alone, assert_all_equal, on_ranks

FP8 = ("--moe-fp8", "emulate")
BRANCH = ("--moe-expert-count", 4)


def of_experts(found: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the experts' parameters: of their forward passes and one product of the backward pass."""
    return {name: tensor for name, tensor in found["gradients"].items() if ".experts." in name}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two tensors of one name, as a share of its norm."""
    assert a.keys() == b.keys() and a
    return max(float((tensor - b[name]).norm() / b[name].norm()) for name, tensor in a.items())


def test_ranks_that_exchange_rows_equal_one_process() -> None:
    expected, plain = of_experts(alone((*BRANCH, *FP8), 2)), of_experts(alone(BRANCH, 2))
    for found in on_ranks((*BRANCH, *FP8, "--ddp-backend", "legacy_ddp"), 2):
        assert distance(of_experts(found), expected) < 3e-6
    # What lies behind the experts is not compared: there a value near a tie is quantised otherwise.
    assert distance(expected, plain) > 1e-2


@pytest.mark.parametrize(
    "gates", [BRANCH, (*MEGATRON, "--expert-model-parallel-size", 1)], ids=["branch", "topk"]
)
def test_shards_and_recomputation_change_no_number(gates: tuple[Any, ...]) -> None:
    flags = (*gates, "--dropout", 0.2, "--activation-dropout", 0.1, "--ddp-backend")
    expected = on_ranks((*flags, "legacy_ddp", *FP8), 2)[0]
    assert distance(of_experts(on_ranks((*flags, "legacy_ddp"), 2)[0]), of_experts(expected)) > 1e-2
    recompute = ("--moe-layer-recompute", "--min-params-to-wrap", 1)
    drops = expected["logged"]["drop_rate"] > 0
    assert_all_equal(on_ranks((*flags, "fully_sharded", *FP8, *recompute), 2), expected, drops=drops)
    for flag in ("--moe-layer-recompute", "--checkpoint-activations"):
        again = on_ranks((*flags, "legacy_ddp", *FP8, flag), 2)[0]
        for name, tensor in expected["gradients"].items():
            assert torch.equal(again["gradients"][name], tensor), (flag, name)
