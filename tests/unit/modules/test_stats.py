"""Statistics of a routing decision by hand: names, units, and never NaN."""

import math

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.routing import stats
from fairseq_moe.modules.routing.contract import AssignmentCounts, RoutingDecision, count_assignments

BRANCH_STATS = {
    "overflow_expert1",
    "overflow_expert2",
    "entropy_gating",
    "expert1_balance_top",
    "expert1_balance_bottom",
    "unused_expert1_count",
    "expert2_balance_top",
    "expert2_balance_bottom",
    "unused_expert2_count",
    "all_to_all_cpu_time_ms",
    "all_to_all_cuda_time_ms",
}


def named(gates: torch.Tensor, decision: RoutingDecision, **times: float) -> dict[str, float]:
    found = of_layer(gates, decision.counts, left_out_T=decision.left_out_T, **times)
    return dict(zip(stats.LAYER_STATS, found.tolist(), strict=True))


def of_layer(
    gates: Tensor, counts: AssignmentCounts, *, left_out_T: Tensor | None = None, **times: float
) -> Tensor:
    measures = stats.layer_measures(stats.gate_entropy(gates, left_out_T=left_out_T), **times)
    assert measures.shape == (len(stats.MEASURES),)
    vector = stats.layer_stats(counts.histogram_34E.unsqueeze(0), measures.unsqueeze(0))
    assert vector.dtype == torch.float32
    assert vector.shape == (1, len(stats.LAYER_STATS))
    return vector[0]


def test_names_are_those_of_the_branch_and_two_more() -> None:
    assert set(stats.LAYER_STATS) == BRANCH_STATS | {"drop_rate", "expert_bias_spread"}


def test_by_hand() -> None:
    # token    0      1      2      3        expert 0 has two places, all others enough
    # choice   0, 1   0, 1   0, 2   1, 0
    # wanted   + , +  + , -  + , +  +, +
    # kept     + , +  + , -  - , +  +, -
    decision = RoutingDecision.counted(
        expert_ids_TK=torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]]),
        requested_TK=torch.tensor([[True, True], [True, False], [True, True], [True, True]]),
        kept_TK=torch.tensor([[True, True], [True, False], [False, True], [True, False]]),
        num_experts=4,
        capacity=2,
    )
    gates = torch.tensor([[0.25] * 4] * 4)
    found = named(gates, decision, all_to_all_cpu_time_ms=1.5, all_to_all_cuda_time_ms=0.5)
    assert found == pytest.approx(
        {
            "overflow_expert1": 25.0,  # 1 of 4
            "overflow_expert2": 100 / 3,  # 1 of 3 that were wanted
            "entropy_gating": math.log(4),
            "unused_expert1_count": 2,  # first choices 0 0 0 1
            "unused_expert2_count": 1,  # second choices 1 1 2 0, whether wanted or not
            "expert1_balance_top": 75.0,  # k = ceil(0.2 * 4) = 1
            "expert1_balance_bottom": 0.0,
            "expert2_balance_top": 50.0,
            "expert2_balance_bottom": 0.0,
            "all_to_all_cpu_time_ms": 1.5,
            "all_to_all_cuda_time_ms": 0.5,
            "expert_bias_spread": 0.0,
            "drop_rate": 100 * 2 / 7,
        },
        rel=1e-5,
    )
    assert decision.counts.requested_E.tolist() == [4, 2, 1, 0]
    assert decision.counts.kept_E.tolist() == [2, 2, 1, 0]


def test_one_expert_per_token_logs_zeros_as_the_branch_and_a_true_drop_rate() -> None:
    ids = torch.zeros(4, 1, dtype=torch.int64)
    wanted = torch.ones(4, 1, dtype=torch.bool)
    kept = torch.tensor([[True], [False], [False], [False]])
    decision = RoutingDecision.counted(
        expert_ids_TK=ids, requested_TK=wanted, kept_TK=kept, num_experts=2, capacity=1
    )
    found = named(torch.full((4, 2), 0.5), decision)
    assert found["overflow_expert1"] == 0
    assert all(found[name] == 0 for name in BRANCH_STATS if "expert2" in name)
    assert found["expert1_balance_top"] == 100
    assert found["unused_expert1_count"] == 1
    assert found["drop_rate"] == 75


@pytest.mark.parametrize("num_experts", [1, 4, 5, 6, 10, 11])
def test_share_of_experts_counted_as_top(num_experts: int) -> None:
    # expert e is chosen e + 1 times
    ids = torch.cat([torch.full((e + 1,), e) for e in range(num_experts)]).view(-1, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    decision = RoutingDecision.counted(
        expert_ids_TK=ids, requested_TK=mask, kept_TK=mask, num_experts=num_experts, capacity=None
    )
    found = named(torch.full((len(ids), num_experts), 1 / num_experts), decision)
    k = max(math.ceil(0.2 * num_experts), 1)
    total = num_experts * (num_experts + 1) / 2
    assert found["expert1_balance_top"] == pytest.approx(
        100 * sum(range(num_experts - k + 1, num_experts + 1)) / total
    )
    assert found["expert1_balance_bottom"] == pytest.approx(100 * sum(range(1, k + 1)) / total)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_wanted_is_never_nan(num_tokens: int, top_k: int) -> None:
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    none = torch.zeros_like(ids, dtype=torch.bool)
    decision = RoutingDecision.counted(
        expert_ids_TK=ids, requested_TK=none, kept_TK=none, num_experts=4, capacity=0
    )
    assert all(math.isfinite(value) for value in named(torch.full((num_tokens, 4), 0.25), decision).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_certain_gates_have_no_entropy(dtype: torch.dtype) -> None:
    gates = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
    mask = torch.ones(1, 1, dtype=torch.bool)
    decision = RoutingDecision.counted(
        expert_ids_TK=torch.zeros(1, 1, dtype=torch.int64),
        requested_TK=mask,
        kept_TK=mask,
        num_experts=3,
        capacity=None,
    )
    assert named(gates, decision)["entropy_gating"] == pytest.approx(0.0, abs=1e-5)


def test_padding_is_in_no_number() -> None:
    """Tokens 1 and 4 are padding; without them the numbers are those of the other three."""
    ids = torch.tensor([[0, 1], [3, 2], [0, 2], [1, 0], [3, 2]])
    padding = torch.tensor([False, True, False, False, True])
    gates = torch.softmax(torch.arange(20.0).reshape(5, 4) % 7, -1)
    requested = (~padding).unsqueeze(-1).expand(5, 2)
    kept = requested & torch.tensor([[True, False]])

    def counts(tokens: Tensor, padding_T: Tensor | None) -> AssignmentCounts:
        return count_assignments(
            ids[tokens], requested[tokens], kept[tokens], num_experts=4, padding_T=padding_T
        )

    everywhere = torch.ones_like(padding)
    found = of_layer(gates, counts(everywhere, padding), left_out_T=padding)
    torch.testing.assert_close(found, of_layer(gates[~padding], counts(~padding, None)))
    everything = of_layer(gates, counts(everywhere, None))
    assert not torch.allclose(found, everything)
    none = torch.zeros_like(requested)
    nothing = count_assignments(ids, none, none, num_experts=4, padding_T=everywhere)
    assert torch.isfinite(of_layer(gates, nothing, left_out_T=everywhere)).all()


def test_an_empty_batch_and_one_of_padding_alone_give_zero() -> None:
    """But for the experts that nobody chooses, which are all of them."""
    for num_tokens in (0, 3):
        ids = torch.zeros(num_tokens, 2, dtype=torch.int64)
        none = torch.zeros_like(ids, dtype=torch.bool)
        padding = torch.ones(num_tokens, dtype=torch.bool)
        decision = RoutingDecision.counted(
            expert_ids_TK=ids,
            requested_TK=none,
            kept_TK=none,
            num_experts=4,
            capacity=0,
            padding_T=padding,
        )
        assert decision.left_out_T is padding
        found = named(torch.full((num_tokens, 4), 0.25), decision)
        assert found.pop("unused_expert1_count") == 4
        assert found.pop("unused_expert2_count") == (4 if num_tokens else 0)
        assert set(found.values()) == {0.0}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_layers_together_have_the_numbers_of_each_by_itself(top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    histograms, measures, alone, loads = [], [], [], []
    for layer in range(4):
        gates = torch.rand(30, 7, generator=generator).softmax(-1)
        padding = torch.rand(30, generator=generator) < (0.3 if layer < 3 else 2.0)
        ids = torch.rand(30, 7, generator=generator).argsort(-1)[:, :top_k]
        requested = (torch.rand(30, top_k, generator=generator) < 0.8) & ~padding.unsqueeze(-1)
        kept = requested & (torch.rand(30, top_k, generator=generator) < 0.6)
        counts = count_assignments(ids, requested, kept, num_experts=7, padding_T=padding)
        of_entropy = stats.gate_entropy(gates, left_out_T=padding)
        histograms.append(counts.histogram_34E)
        measures.append(
            stats.layer_measures(of_entropy, all_to_all_cpu_time_ms=layer, bias_E=torch.arange(7.0) * layer)
        )
        alone.append(stats.layer_stats(histograms[-1].unsqueeze(0), measures[-1].unsqueeze(0))[0])
        loads.append(torch.stack([counts.requested_E, counts.kept_E]).float())
        times = dict(zip(stats.LAYER_STATS, alone[-1].tolist(), strict=True))
        assert (times["all_to_all_cpu_time_ms"], times["expert_bias_spread"]) == (layer, 6 * layer)
    together = stats.layer_stats(torch.stack(histograms), torch.stack(measures))
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[0], together[1])
    assert torch.equal(stats.layer_loads(torch.stack(histograms)), torch.stack(loads))
