"""What the ranks of a micro-batch count together: each token once over all ranks, by few collectives.

Run with ``pytest tests/distributed/test_shard_counts.py``. Losses and statistics: test_shard_losses.py.
"""

from typing import Any

import pytest
import torch

from fairseq_moe.modules import LOSSES, RouterMode, TokenInfo
from fairseq_moe.modules.routing.stats import MEASURES
from tests.helpers.ranks import run_ranks
from tests.helpers.shard_routing import (
    BATCH,
    CASES,
    EXPERTS,
    LAYERS,
    LENGTHS,
    TOLERANCE,
    differs_by,
    layers_of,
    micro_batch,
    own_tokens,
    update_routers,
)

# --- several micro-batches at a time ---


def _on_rank_of_two(rank: int, name: str) -> dict[str, Any]:
    """Update once on D2T2: each pair of ranks has micro-batches of its own."""
    from fairseq_moe.distributed.mesh import parallel_mesh
    from fairseq_moe.distributed.sequence import shards_of

    mesh = parallel_mesh(EXPERTS, tensor=2)
    shards, data_index = shards_of(mesh), mesh.ranks.coordinate(rank, "data")
    options, mode = CASES[name]
    case = (mode, LENGTHS[0], True)
    found = update_routers(layers_of(options, shards), shards, case, first_seed=2 * data_index)
    return {**found, "data_index": data_index}


def _one_of_two(rank: int, name: str, data_index: int) -> dict[str, Any]:
    from fairseq_moe.modules.shards import LocalShards

    options, mode = CASES[name]
    case = (mode, LENGTHS[0], True)
    return update_routers(layers_of(options, LocalShards()), LocalShards(), case, first_seed=2 * data_index)


def test_what_all_ranks_count_has_each_token_once() -> None:
    """Losses are those of a pair's micro-batches; counts for global_aux and the bias those of both pairs'."""
    from fairseq_moe.modules.routing.bias import sign_step

    name = "sigmoid in groups, bias by signs"
    alone = [run_ranks(_one_of_two, 1, name, data_index)[0] for data_index in range(2)]
    found = run_ranks(_on_rank_of_two, 4, name)
    assert sorted(rank["data_index"] for rank in found) == [0, 0, 1, 1]
    for rank in found:
        wanted = alone[rank["data_index"]]
        assert all(map(torch.equal, rank["histograms"], wanted["histograms"]))
        for losses, of_one in zip(rank["losses"], wanted["losses"], strict=True):
            others = [index for index, loss in enumerate(LOSSES) if loss != "global_aux"]
            assert differs_by([losses[:, others]], [of_one[:, others]]) < TOLERANCE
            assert (losses - of_one).abs().max() > 1e-3  # counts of both pairs
    for layer in range(LAYERS):
        counts_E = sum(of_one["local"][layer] for of_one in alone)
        assert torch.equal(sum(rank["local"][layer] for rank in found), counts_E)
        for rank in found:
            assert torch.equal(rank["global"][layer], sum(of_one["global"][layer] for of_one in alone))
            assert torch.equal(rank["biases"][layer], sign_step(counts_E, rate=0.05))


# --- collectives ---


def _calls(rank: int, axes: dict[str, int], name: str) -> list[list[str]]:
    """List the calls of three passes: a first one, the same recomputed, and one for evaluation; with all gradients."""
    from fairseq_moe.distributed.mesh import parallel_mesh
    from fairseq_moe.distributed.sequence import GroupShards
    from fairseq_moe.modules import whole_auxes
    from fairseq_moe.modules.moe_layer import RoutingMemo

    calls: list[str] = []

    class Counting(GroupShards):
        def __getattribute__(self, attribute: str) -> Any:
            if attribute in ("sum_counts", "total", "gather_tokens"):
                calls.append(attribute)
            return super().__getattribute__(attribute)

    shards = Counting(parallel_mesh(EXPERTS, **axes))
    options, _ = CASES[name]
    layers = layers_of(options, shards)
    x_TD = own_tokens(micro_batch(9, False, 0)[0], shards)
    memos = [RoutingMemo() for _ in layers]
    listed, results = [], []
    for mode, memo in (
        (RouterMode.TRAIN, memos),
        (RouterMode.TRAIN, memos),
        (RouterMode.EVAL, [None] * LAYERS),
    ):
        tokens = TokenInfo(mode=mode, num_sequences=BATCH)
        passes = zip(layers, memo, strict=True)
        auxes = [layer(x_TD, tokens=tokens, memo=each)[1] for layer, each in passes]
        results.append([torch.stack([aux.losses for aux in auxes]), auxes[0].histogram_34E])
        if memo is not memos or len(listed) == 0:
            whole_auxes(auxes, shards)[0].losses.sum().backward()
        listed.append(calls.copy())
        calls.clear()
    assert all(map(torch.equal, results[0], results[1])), "the recomputed pass found other numbers"
    return listed


@pytest.mark.parametrize("name", ["branch, two experts", "softmax in groups", "softmax, bias by quantiles"])
def test_one_collective_for_a_decision_none_for_a_recomputed_one_and_one_for_all_layers(name: str) -> None:
    of_layer = ["sum_counts", *(["gather_tokens"] if "quantiles" in name else [])]
    for first, again, evaluation in run_ranks(_calls, 4, {"tensor": 2, "context": 2}, name):
        assert first == [*of_layer, *of_layer, "total"]
        assert again == []
        assert evaluation == ["sum_counts", "sum_counts", "total"]


def test_measures_are_summed_averaged_or_left() -> None:
    assert MEASURES == (
        "entropy_sum",
        "all_to_all_cpu_time_ms",
        "all_to_all_cuda_time_ms",
        "expert_bias_spread",
    )
    found = run_ranks(_measures, 4, {"tensor": 2, "context": 2})
    assert found == [[10.0, 2.5, 25.0, 0.1]] * 4


def _measures(rank: int, axes: dict[str, int]) -> list[float]:
    from fairseq_moe.distributed.mesh import parallel_mesh
    from fairseq_moe.distributed.sequence import shards_of
    from fairseq_moe.modules import MoEAux, whole_auxes

    measures = torch.tensor([rank + 1.0, rank + 1.0, 10 * (rank + 1.0), 0.1])
    aux = MoEAux(losses=torch.zeros(5), histogram_34E=torch.zeros(3, 4, EXPERTS).long(), measures_4=measures)
    (joined,) = whole_auxes([aux], shards_of(parallel_mesh(EXPERTS, **axes)))
    assert joined is not None and not joined.measures_4.requires_grad
    return [round(value, 6) for value in joined.measures_4.tolist()]
