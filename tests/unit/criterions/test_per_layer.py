"""--moe-per-layer-logging: numbers of each layer, right over micro-batches and ranks."""

import math
from typing import Any

import pytest
import torch
from fairseq.logging import metrics

from fairseq_moe.criterions.per_layer import log_per_layer, per_layer_sums
from fairseq_moe.modules import LOSSES, MoEAux
from fairseq_moe.modules.routing.stats import LAYER_STATS


def make_aux(seed: int, load: list[list[float]]) -> MoEAux:
    generator = torch.Generator().manual_seed(seed)
    return MoEAux(
        losses=torch.rand(len(LOSSES), generator=generator),
        stats=torch.rand(len(LAYER_STATS), generator=generator),
        load_2E=torch.tensor(load),
    )


# Two micro-batches of 10 and 30 tokens; layers 1 and 3 have experts.
BATCHES = [
    (10, [None, make_aux(0, [[8.0, 2.0], [5.0, 2.0]]), None, make_aux(1, [[5.0, 5.0], [5.0, 5.0]])]),
    (30, [None, make_aux(2, [[10.0, 20.0], [10.0, 15.0]]), None, make_aux(3, [[0.0, 30.0], [0.0, 15.0]])]),
]


def logged(outputs: list[dict[str, Any]], sample_size: int, batches: int) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as found:
        log_per_layer(outputs, sample_size=sample_size, batches=batches)
    return {name: float(value) for name, value in found.get_smoothed_values().items()}


def test_losses_by_tokens_statistics_by_batches_and_loads_by_their_sum() -> None:
    outputs = [per_layer_sums(auxes, size) for size, auxes in BATCHES]
    found = logged(outputs, 40, 2)
    for layer in (1, 3):
        first, second = (auxes[layer] for _, auxes in BATCHES)
        assert first is not None and second is not None
        for index, name in enumerate(LOSSES):
            mean = (10 * first.losses[index] + 30 * second.losses[index]) / 40
            assert found[f"layer{layer}_{name}_loss"] == pytest.approx(float(mean), abs=1e-6)
        for name in ("entropy_gating", "expert_bias_spread"):
            index = LAYER_STATS.index(name)
            mean = (first.stats[index] + second.stats[index]) / 2
            assert found[f"layer{layer}_{name}"] == pytest.approx(float(mean), abs=1e-4)
    # Layer 1: 18 and 22 wanted, 32 of 40 kept. Layer 3: 5 and 35 wanted, 25 of 40 kept.
    by_hand = {
        "layer1_max_violation": 0.1, "layer1_min_violation": 0.1, "layer1_drop_rate": 20.0,
        "layer1_load_expert0": 45.0, "layer1_load_expert1": 55.0,
        "layer3_max_violation": 0.75, "layer3_min_violation": 0.75, "layer3_drop_rate": 37.5,
        "layer3_load_expert0": 12.5, "layer3_load_expert1": 87.5,
    }  # fmt: skip
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-4)
    assert not any(name.startswith(("layer0", "layer2", "_moe")) for name in found)


def test_sums_of_ranks_log_the_same() -> None:
    outputs = [per_layer_sums(auxes, size) for size, auxes in BATCHES]
    summed = {key: outputs[0][key] + outputs[1][key] for key in outputs[0]}
    assert logged([summed], 40, 2) == logged(outputs, 40, 2)


def test_an_update_of_padding_logs_zeros_and_no_nan() -> None:
    outputs = [per_layer_sums([make_aux(0, [[0.0, 0.0], [0.0, 0.0]])], 10)]
    found = logged(outputs, 10, 1)
    assert all(math.isfinite(value) for value in found.values())
    assert found["layer0_drop_rate"] == found["layer0_max_violation"] == found["layer0_load_expert0"] == 0


def test_nothing_is_logged_without_the_flag() -> None:
    assert logged([{"loss": 1.0}], 10, 1) == {}
