"""--moe-per-layer-logging: numbers of each layer, right over micro-batches and ranks."""

import math
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from torch import Tensor

from fairseq_moe.criterions.per_layer import log_per_layer, per_layer_sums
from fairseq_moe.modules import LOSSES, MoEAux
from fairseq_moe.modules.routing.stats import LAYER_STATS, MEASURES
from tests.helpers.layer_stats import histogram_of, load_of, stats_of


def make_aux(seed: int, load: list[list[int]]) -> MoEAux:
    generator = torch.Generator().manual_seed(seed)
    return MoEAux(
        losses=torch.rand(len(LOSSES), generator=generator),
        histogram_34E=histogram_of(load),
        measures_4=torch.rand(len(MEASURES), generator=generator),
    )


# Two micro-batches of 10 and 30 tokens; layers 1 and 3 have experts.
BATCHES = [
    (10, [None, make_aux(0, [[8, 2], [5, 2]]), None, make_aux(1, [[5, 5], [5, 5]])]),
    (30, [None, make_aux(2, [[10, 20], [10, 15]]), None, make_aux(3, [[0, 30], [0, 15]])]),
]


def sums_of(auxes: list[MoEAux | None], sample_size: int) -> dict[str, Tensor]:
    """What the criterion adds to its logging output, of the layers' own statistics."""
    made = [aux for aux in auxes if aux is not None]
    stats, loads = ([of(aux) for aux in made] for of in (stats_of, lambda aux: load_of(aux)))
    return per_layer_sums(auxes, torch.stack(stats), torch.stack(loads), sample_size)


def logged(outputs: list[dict[str, Any]], sample_size: int, batches: int) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as found:
        log_per_layer(outputs, sample_size=sample_size, batches=batches)
    return {name: float(value) for name, value in found.get_smoothed_values().items()}


def test_losses_by_tokens_statistics_by_batches_and_loads_by_their_sum() -> None:
    outputs = [sums_of(auxes, size) for size, auxes in BATCHES]
    found = logged(outputs, 40, 2)
    for layer in (1, 3):
        first, second = (auxes[layer] for _, auxes in BATCHES)
        assert first is not None and second is not None
        for index, name in enumerate(LOSSES):
            mean = (10 * first.losses[index] + 30 * second.losses[index]) / 40
            assert found[f"layer{layer}_{name}_loss"] == pytest.approx(float(mean), abs=1e-6)
        for name in ("entropy_gating", "expert_bias_spread"):
            index = LAYER_STATS.index(name)
            mean = (stats_of(first)[index] + stats_of(second)[index]) / 2
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
    outputs = [sums_of(auxes, size) for size, auxes in BATCHES]
    summed = {key: outputs[0][key] + outputs[1][key] for key in outputs[0]}
    assert logged([summed], 40, 2) == logged(outputs, 40, 2)


def test_an_update_of_padding_logs_zeros_and_no_nan() -> None:
    outputs = [sums_of([make_aux(0, [[0, 0], [0, 0]])], 10)]
    found = logged(outputs, 10, 1)
    assert all(math.isfinite(value) for value in found.values())
    assert found["layer0_drop_rate"] == found["layer0_max_violation"] == found["layer0_load_expert0"] == 0


def test_nothing_is_logged_without_the_flag() -> None:
    assert logged([{"loss": 1.0}], 10, 1) == {}
