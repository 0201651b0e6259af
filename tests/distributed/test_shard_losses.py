"""Losses, gradients, statistics and expert biases of micro-batches whose tokens are spread over 2 and 4 ranks.

Run with ``pytest tests/distributed/test_shard_losses.py``. Each is compared with one process that has all tokens, in
float64. Nothing is dropped but where the test says so, because capacity is a matter of each rank.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.routing.stats import LAYER_STATS
from tests.helpers.ranks import run_ranks
from tests.helpers.shard_routing import (
    BATCH,
    CASES,
    DROPPING,
    EXPERTS,
    LENGTHS,
    TOLERANCE,
    differs_by,
    layers_of,
    update_routers,
)

# Axes of ``parallel_mesh`` and the number of ranks that they fill.
MESHES: dict[str, tuple[dict[str, int], int]] = {
    "T2": ({"tensor": 2}, 2),
    "C2": ({"context": 2}, 2),
    "C2T2": ({"tensor": 2, "context": 2}, 4),
}


def _all_updates(shards: Any, lengths: tuple[int, ...] = LENGTHS) -> dict[Any, Any]:
    found = {}
    for name, (options, mode) in (CASES | DROPPING).items():
        for length in lengths:
            for padded in (False, True):
                layers = layers_of(options, shards)
                if options.get("bias"):
                    update_routers(layers, shards, (mode, length, padded))  # the next one has biases
                found[name, length, padded] = update_routers(layers, shards, (mode, length, padded))
    return found


def _on_rank(rank: int, axes: dict[str, int]) -> dict[str, Any]:
    from fairseq_moe.distributed.mesh import parallel_mesh
    from fairseq_moe.distributed.sequence import shards_of
    from fairseq_moe.modules.shards import LocalShards

    shards = shards_of(parallel_mesh(EXPERTS, **axes))

    class Alone(LocalShards):
        """This rank's tokens, without the other ranks."""

        part_of = staticmethod(shards.part_of)

    return {"whole": _all_updates(shards), "alone": _all_updates(Alone(), LENGTHS[:1])}


def _alone(rank: int) -> dict[Any, Any]:
    from fairseq_moe.modules.shards import LocalShards

    return _all_updates(LocalShards())


@pytest.fixture(scope="module")
def one() -> dict[Any, Any]:
    return run_ranks(_alone, 1)[0]


@pytest.fixture(scope="module", params=MESHES)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    axes, world_size = MESHES[request.param]
    return run_ranks(_on_rank, world_size, axes, timeout=100.0)


ENTROPY = LAYER_STATS.index("entropy_gating")


def _others(stats: Tensor) -> Tensor:
    return torch.cat([stats[:, :ENTROPY], stats[:, ENTROPY + 1 :]], 1)


def test_ranks_without_tokens_are_among_them(ranks: list[dict[str, Any]]) -> None:
    sizes = [found["whole"]["softmax", 9, False]["tokens"][0] for found in ranks]
    assert sum(sizes) == 9 * BATCH
    assert (min(sizes) == 0) is (len(ranks) == 4)


def test_losses_are_those_of_one_process(ranks: list[dict[str, Any]], one: dict[Any, Any]) -> None:
    for key, wanted in one.items():
        for rank in ranks:
            assert differs_by(rank["whole"][key]["losses"], wanted["losses"]) < TOLERANCE, key
            assert all((losses >= 0).all() and losses.sum() > 0 for losses in wanted["losses"])


def test_gradients_add_up_to_those_of_one_process(ranks: list[dict[str, Any]], one: dict[Any, Any]) -> None:
    for key, wanted in one.items():
        of_ranks = [rank["whole"][key]["gradients"] for rank in ranks]
        sums = [torch.stack(gradients).sum(0) for gradients in zip(*of_ranks, strict=True)]
        assert differs_by(sums, wanted["gradients"]) < TOLERANCE, key
        assert all(gradient.abs().max() > 1e-3 for gradient in wanted["gradients"])
        for rank in ranks:
            if sum(rank["whole"][key]["tokens"]) == 0:
                assert all(gradient.eq(0).all() for gradient in rank["whole"][key]["gradients"])


def test_statistics_are_those_of_one_process(ranks: list[dict[str, Any]], one: dict[Any, Any]) -> None:
    for key, wanted in one.items():
        if key[0] in DROPPING:
            continue
        for found in (rank["whole"][key] for rank in ranks):
            for name in ("histograms", "global"):
                assert all(map(torch.equal, found[name], wanted[name])), (key, name)
            assert all(map(torch.equal, map(_others, found["stats"]), map(_others, wanted["stats"]))), key
            # Entropies are summed in float32, in another order.
            assert differs_by(found["stats"], wanted["stats"]) < 1e-6, key
        assert any(stats[:, ENTROPY].gt(0.1).all() for stats in wanted["stats"])


def test_expert_biases_are_those_of_one_process(ranks: list[dict[str, Any]], one: dict[Any, Any]) -> None:
    for key, wanted in one.items():
        if wanted["biases"][0] is None or key[0] in DROPPING:
            continue
        assert any(bias.abs().max() > 0.01 for bias in wanted["biases"]), (key, wanted["biases"])
        for rank in ranks:
            found = rank["whole"][key]["biases"]
            if "signs" in key[0]:
                assert all(map(torch.equal, found, wanted["biases"])), key
            else:  # each rank adds the same thresholds, so sums in float32 are larger
                assert differs_by(found, wanted["biases"]) < 1e-6, key
            assert all(map(torch.equal, found, ranks[0]["whole"][key]["biases"])), key


def test_where_experts_are_full_the_same_is_requested(
    ranks: list[dict[str, Any]], one: dict[Any, Any]
) -> None:
    """Each rank has slots of its own: it may drop what one process keeps, and requests the same."""
    for key in (key for key in one if key[0] in DROPPING):
        for rank in ranks:
            for found, wanted in zip(rank["whole"][key]["histograms"], one[key]["histograms"], strict=True):
                assert torch.equal(found[:, :, :2].sum(2), wanted[:, :, :2].sum(2)), key
                assert wanted[:, :, 1].sum() > 0 or key[2], key  # padding makes room
        if key[1] != LENGTHS[0]:
            continue
        parts = [torch.stack(rank["alone"][key]["histograms"]) for rank in ranks]
        whole = torch.stack(ranks[0]["whole"][key]["histograms"])
        if "branch" in key[0]:  # without a bias, ranks by themselves make the same decisions
            assert torch.equal(torch.stack(parts).sum(0), whole), key


def test_the_mean_over_ranks_would_be_another_number(
    ranks: list[dict[str, Any]], one: dict[Any, Any]
) -> None:
    """What is compared above can tell sums from means: of losses, of statistics and of quantiles' thresholds."""
    for key, wanted in one.items():
        if key[1] != LENGTHS[0] or key[0] in DROPPING:
            continue
        for name in ("losses", "stats", "biases"):
            if wanted[name][0] is None:
                continue
            of_ranks = [rank["alone"][key][name] for rank in ranks]
            means = [torch.stack(values).mean(0) for values in zip(*of_ranks, strict=True)]
            assert differs_by(means, wanted[name]) > 1e-3, (key, name)
        top = LAYER_STATS.index("expert1_balance_top")
        of_ranks = [[stats[:, top] for stats in rank["alone"][key]["stats"]] for rank in ranks]
        means = [torch.stack(values).mean(0) for values in zip(*of_ranks, strict=True)]
        assert differs_by(means, [stats[:, top] for stats in wanted["stats"]]) > 1e-3, key
