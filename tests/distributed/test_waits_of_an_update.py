"""How often the host waits for the device in an update that is not logged: at most five times.

There is no device here: ``tests.helpers.pretend_device`` says what would lie on one. bench_gpu.py counts on a device.
"""

import functools
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

MODEL = [
    "--decoder-layers", 6, "--moe-freq", 2, "--moe-expert-count", 8, "--moe-gating-use-fp32", "--optimizer", "adam",
    "--lr", 0.01, "--log-interval", 1000, "--fp16-init-scale", 4,
]  # fmt: skip
BRANCH = [
    "--ddp-backend",
    "fully_sharded",
    "--memory-efficient-fp16",
    "--checkpoint-activations",
    "--fp16-adam-stats",
]
PRECISIONS = {
    "fully_sharded fp16": BRANCH,
    "legacy_ddp bf16": ["--ddp-backend", "legacy_ddp", "--memory-efficient-bf16", "--clip-norm", 1.0],
    "legacy_ddp bf16 with fp32 copies": ["--ddp-backend", "legacy_ddp", "--bf16", "--clip-norm", 1.0],
    "legacy_ddp fp32": ["--ddp-backend", "legacy_ddp", "--clip-norm", 1.0],
}
# Whatever the precision, and however many layers.
REMAINING = {
    "fairseq/models/transformer/transformer_decoder.py": 1,  # stock: is there padding?
    "fairseq_moe/stock/step/gradients.py": 1,  # the norm, and what else ranks agree on
    "fairseq_moe/stock/step/expert_load.py": 1,  # all numbers for the log
}


def _waits(rank: int, flags: list[Any], *, layers_too: bool = False, num_padded: int = 0) -> dict[str, int]:
    from fairseq_moe.fused import adam
    from fairseq_moe.optim import half_adam, one_pass_adam
    from tests.helpers.pretend_device import PretendDevice, take_the_ways_of_a_gpu
    from tests.helpers.tiny import build_trainer, make_batch

    if layers_too:
        take_the_ways_of_a_gpu()
    for module in (adam, half_adam, one_pass_adam):
        module.runs_triton = lambda *tensors: True
    trainer = build_trainer([*MODEL, *flags])
    first, second = (make_batch(seed, num_padded=num_padded) for seed in range(2))
    trainer.train_step([first])
    with PretendDevice() as device:
        trainer.train_step([second])
    return dict(device.waits)


@pytest.mark.parametrize("num_padded", [0, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_remains_around_the_layers(precision: str, num_padded: int) -> None:
    """Of layers, tests/unit/modules/test_host_waits.py counts; what stands in for their kernels here asks the host."""
    pytest.importorskip("triton")
    (found,) = run_ranks(functools.partial(_waits, num_padded=num_padded), 1, PRECISIONS[precision])
    layers = ("fairseq_moe/modules/", "fairseq_moe/fused/")
    assert {place: n for place, n in found.items() if not place.startswith(layers)} == REMAINING
    assert any(place.startswith(layers) for place in found)  # so a wait within a pass is seen


@pytest.mark.slow
def test_what_remains_with_all_kernels() -> None:
    pytest.importorskip("triton")
    small = ["--decoder-layers", 4, "--moe-expert-count", 2]
    (found,) = run_ranks(functools.partial(_waits, layers_too=True), 1, [*BRANCH, *small])
    assert found == REMAINING
    assert sum(found.values()) <= 5
