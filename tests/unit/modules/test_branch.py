"""Routing decisions on hand-sized tables: who is chosen, who stands where in the queue, who is kept."""

import math

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.routing import branch, contract
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.branch import SecondExpertPolicy
from fairseq_moe.modules.routing.contract import TokenInfo
from fairseq_moe.modules.routing.router import BranchConfig, Router, RouterMode

ALL = SecondExpertPolicy.ALL


def logits_preferring(*choices: tuple[int, int], num_experts: int, top: float = 3.0) -> Tensor:
    """Logits whose largest entry is each token's first choice and whose next is its second."""
    logits_TE = torch.zeros(len(choices), num_experts)
    for token, (first, second) in enumerate(choices):
        logits_TE[token, second] = top - 1
        logits_TE[token, first] = top
    return logits_TE


def decide(logits_TE: Tensor, **kwargs: object) -> contract.RoutingDecision:
    options: dict[str, object] = {"capacity": None, "policy": ALL, "training": True, **kwargs}
    return branch.decide_top2(logits_TE, logits_TE.softmax(-1), **options)  # type: ignore[arg-type]


class TestQueues:
    def test_second_choices_stand_behind_all_first_choices(self) -> None:
        # token   0       1       2       3
        # choice  0 , 1   1 , 0   0 , 2   0 , 1
        #
        # queue of expert 0: t0 t2 t3 | t1       positions 0 1 2 | 3
        # queue of expert 1: t1       | t0 t3              0     | 1 2
        # queue of expert 2:          | t2                       | 0
        ids = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])
        positions = contract.queue_positions(ids, torch.ones_like(ids, dtype=torch.bool), num_experts=3)
        assert positions.tolist() == [[0, 1], [0, 3], [1, 0], [2, 2]]

    def test_unwanted_assignments_take_no_place(self) -> None:
        # as above, but token 0 is padding and token 3 wants no second expert:
        # queue of expert 0: t2 t3 | t1          queue of expert 1: t1 |          queue of expert 2: | t2
        ids = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])
        wanted = torch.tensor([[False, False], [True, True], [True, True], [True, False]])
        positions = contract.queue_positions(ids, wanted, num_experts=3)
        assert positions[wanted].tolist() == [0, 2, 0, 0, 1]

    def test_priority_reorders_both_choices(self) -> None:
        # priorities 0.1 0.9 0.5 0.7: order t1 t3 t2 t0
        # queue of expert 0: t3 t2 t0 | t1       queue of expert 1: t1 | t3 t0       queue of expert 2: | t2
        ids = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])
        wanted = torch.ones_like(ids, dtype=torch.bool)
        priority = torch.tensor([0.1, 0.9, 0.5, 0.7])
        positions = contract.queue_positions(ids, wanted, num_experts=3, priority_T=priority)
        assert positions.tolist() == [[2, 2], [0, 3], [1, 0], [0, 1]]

    def test_equal_priorities_keep_token_order(self) -> None:
        ids = torch.zeros(64, 1, dtype=torch.int64)
        wanted = torch.ones_like(ids, dtype=torch.bool)
        positions = contract.queue_positions(ids, wanted, num_experts=2, priority_T=torch.ones(64))
        assert positions[:, 0].tolist() == list(range(64))

    def test_no_tokens(self) -> None:
        ids = torch.zeros(0, 2, dtype=torch.int64)
        assert contract.queue_positions(ids, ids.bool(), num_experts=4).shape == (0, 2)


class TestCapacity:
    @pytest.mark.parametrize(
        ("tokens", "experts", "top_k", "fraction", "expected"),
        [
            (12, 6, 2, None, 4),  # 2 * ceil(12 / 6)
            (13, 6, 2, None, 6),
            (13, 6, 1, None, 3),
            (13, 6, 2, 0.25, 4),  # ceil(0.25 * 13)
            (13, 6, 1, 0.25, 4),  # the evaluation rule does not know K
            (13, 6, 2, 1.0, 13),
            (13, 6, 2, 0.0, 6),  # at most 0: the training rule
            (13, 6, 2, -1.0, 6),
            (13, 6, 1, -1.0, 3),
            (0, 6, 2, None, 0),
            (0, 6, 2, 0.25, 0),
            (5, 1, 2, None, 10),
            (1, 8, 2, None, 2),
            (1, 8, 2, 0.01, 1),
        ],
    )
    def test_rule(self, tokens: int, experts: int, top_k: int, fraction: float | None, expected: int) -> None:
        capacity = branch.capacity_of(tokens, experts, top_k=top_k, eval_token_fraction=fraction)
        assert capacity == expected

    def test_readme_numbers_of_the_branch(self) -> None:
        assert branch.capacity_of(8192, 8, top_k=2) == 2048
        assert branch.capacity_of(12288, 64, top_k=2) == 384

    @pytest.mark.parametrize(
        ("mode", "expected"), [(RouterMode.TRAIN, 6), (RouterMode.EVAL, 2), (RouterMode.GENERATE, None)]
    )
    def test_mode_selects_the_rule(self, mode: RouterMode, expected: int | None) -> None:
        config = BranchConfig(eval_capacity_token_fraction=0.15)
        router = Router(model_dim=4, num_experts=6, config=config)
        assert router(torch.randn(13, 4), tokens=TokenInfo(mode=mode)).decision.capacity == expected

    def test_generation_can_have_a_capacity(self) -> None:
        router = Router(
            model_dim=4, num_experts=6, config=BranchConfig(generation_capacity_token_fraction=0.5)
        )
        assert router(torch.randn(12, 4), tokens=TokenInfo(mode=RouterMode.GENERATE)).decision.capacity == 6

    def test_cut(self) -> None:
        # every token: first expert 0, second expert 1; two places each
        decision = decide(logits_preferring(*[(0, 1)] * 5, num_experts=4), capacity=2)
        assert decision.kept_TK.tolist() == [[True, True]] * 2 + [[False, False]] * 3
        assert decision.requested_TK.all()

    def test_first_choices_push_out_second_choices(self) -> None:
        # expert 0 is first choice of t2 t3, second choice of t0 t1; expert 1 the other way round.
        logits = logits_preferring((1, 0), (1, 0), (0, 1), (0, 1), num_experts=2)
        decision = decide(logits, capacity=3)
        # queue of expert 0: t2 t3 t0 | t1 dropped     queue of expert 1: t0 t1 t2 | t3 dropped
        assert decision.kept_TK.tolist() == [[True, True], [True, False], [True, True], [True, False]]

    def test_capacity_zero_keeps_nothing(self) -> None:
        decision = decide(torch.randn(4, 3), capacity=0)
        assert not decision.kept_TK.any()


class TestPadding:
    def test_padding_takes_no_place(self) -> None:
        # token 0 is padding: tokens 1 and 2 have the two places
        logits = logits_preferring(*[(0, 1)] * 4, num_experts=4)
        decision = decide(logits, capacity=2, padding_T=torch.tensor([True, False, False, False]))
        assert decision.requested_TK.tolist() == [[False, False]] + [[True, True]] * 3
        assert decision.kept_TK.tolist() == [[False, False], [True, True], [True, True], [False, False]]

    def test_all_padding(self) -> None:
        decision = decide(torch.randn(5, 4), capacity=2, padding_T=torch.ones(5, dtype=torch.bool))
        assert not decision.requested_TK.any()
        assert not decision.kept_TK.any()

    def test_top1(self) -> None:
        gates = logits_preferring(*[(2, 1)] * 3, num_experts=4).softmax(-1)
        decision = branch.decide_top1(gates, capacity=1, padding_T=torch.tensor([True, False, False]))
        assert decision.expert_ids_TK.tolist() == [[2]] * 3
        assert decision.kept_TK.tolist() == [[False], [True], [False]]


class TestPriority:
    def test_surest_tokens_are_kept(self) -> None:
        # expert 0 is everyone's first choice and has two places; tokens 1 and 3 are the surest
        logits = torch.tensor([[1.0, 0, 0], [4.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0]])
        decision = decide(logits, capacity=2, prioritized=True)
        assert decision.kept_TK[:, 0].tolist() == [False, True, False, True]


class TestWeights:
    GATES = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])
    IDS = torch.tensor([[0, 1], [0, 2]])

    def decision(self, kept: list[list[bool]]) -> contract.RoutingDecision:
        wanted = torch.ones(2, 2, dtype=torch.bool)
        return contract.RoutingDecision.counted(
            expert_ids_TK=self.IDS, requested_TK=wanted, kept_TK=torch.tensor(kept), num_experts=3, capacity=1
        )

    def test_normalised_over_both(self) -> None:
        weights = branch.combine_weights(self.GATES, self.decision([[True, True], [True, True]]))
        torch.testing.assert_close(weights, torch.tensor([[5 / 8, 3 / 8], [6 / 9, 3 / 9]]))

    def test_lone_survivor_weighs_one_and_both_dropped_weigh_nothing(self) -> None:
        weights = branch.combine_weights(self.GATES, self.decision([[False, True], [False, False]]))
        torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))

    def test_normalised_before_dropping_loses_the_dropped_weight(self) -> None:
        decision = self.decision([[False, True], [True, False]])
        weights = branch.combine_weights(self.GATES, decision, normalize_before_dropping=True)
        torch.testing.assert_close(weights, torch.tensor([[0.0, 3 / 8], [6 / 9, 0.0]]))

    def test_one_expert_per_token_keeps_its_probability(self) -> None:
        decision = contract.RoutingDecision.counted(
            expert_ids_TK=self.IDS[:, :1],
            requested_TK=torch.ones(2, 1, dtype=torch.bool),
            kept_TK=torch.tensor([[True], [False]]),
            num_experts=3,
            capacity=1,
        )
        weights = branch.combine_weights(self.GATES, decision)
        torch.testing.assert_close(weights, torch.tensor([[0.5], [0.0]]))

    def test_single_expert_chosen_twice_weighs_half_each(self) -> None:
        router = Router(model_dim=4, num_experts=1, config=BranchConfig(second_expert_policy=ALL))
        routed = router(torch.randn(3, 4), tokens=TokenInfo(mode=RouterMode.TRAIN))
        assert routed.decision.expert_ids_TK.tolist() == [[0, 0]] * 3
        assert routed.decision.kept_TK.all()
        torch.testing.assert_close(routed.weights_TK.detach(), torch.full((3, 2), 0.5))

    @pytest.mark.parametrize("use_fp32", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes(self, dtype: torch.dtype, use_fp32: bool) -> None:
        router = Router(model_dim=8, num_experts=4, config=BranchConfig(gating_use_fp32=use_fp32)).to(dtype)
        routed = router(torch.randn(6, 8, dtype=dtype), tokens=TokenInfo(mode=RouterMode.TRAIN))
        narrow = dtype in (torch.float16, torch.bfloat16)
        assert routed.gates_TE.dtype == (torch.float32 if use_fp32 and narrow else dtype)
        assert routed.weights_TK.dtype == dtype


class TestSecondExpert:
    def test_all_takes_the_second_most_probable(self) -> None:
        decision = decide(logits_preferring((2, 0), (1, 3), num_experts=4))
        assert decision.expert_ids_TK.tolist() == [[2, 0], [1, 3]]

    def test_equal_logits_choose_two_different_experts(self) -> None:
        decision = decide(torch.zeros(3, 4))
        assert decision.expert_ids_TK.tolist() == [[0, 1]] * 3

    def test_sampling_draws_in_proportion_to_the_other_gates(self) -> None:
        torch.manual_seed(11)
        probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
        num_draws = 40_000
        logits = probabilities.log().expand(num_draws, 4)
        decision = decide(logits, policy=SecondExpertPolicy.SAMPLING)
        assert (decision.expert_ids_TK[:, 0] == 0).all()
        seen = torch.bincount(decision.expert_ids_TK[:, 1], minlength=4) / num_draws
        expected = torch.tensor([0.0, 0.5, 0.3, 0.2])
        # four standard deviations of a binomial share
        assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / num_draws).sqrt()).all()

    def test_sampling_in_half_precision_draws_in_float32(self) -> None:
        noise = branch.gumbel_noise(torch.zeros(1000, 4, dtype=torch.float16))
        assert noise.dtype == torch.float32
        assert noise.isfinite().all()

    def test_gumbel_moments(self) -> None:
        torch.manual_seed(5)
        noise = branch.gumbel_noise(torch.zeros(200_000, 1, dtype=torch.float64))
        assert abs(float(noise.mean()) - 0.5772) < 0.01
        assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03

    @pytest.mark.parametrize("normalize", [False, True])
    def test_random_keeps_with_probability_twice_its_weight(self, normalize: bool) -> None:
        torch.manual_seed(12)
        num_draws = 40_000
        rows = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.5, 0.45, 0.05]])
        decision = decide(
            rows.log().repeat(num_draws, 1),
            policy=SecondExpertPolicy.RANDOM,
            normalize_before_dropping=normalize,
        )
        seen = decision.requested_TK[:, 1].view(num_draws, 3).float().mean(0)
        first, second = rows[:, 0], rows.topk(2).values[:, 1]
        weight = second / (first + second) if normalize else second
        expected = (2 * weight).clamp(max=1)
        assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / num_draws).sqrt() + 1e-6).all()
        assert decision.requested_TK[:, 0].all()

    @pytest.mark.parametrize("policy", list(SecondExpertPolicy))
    def test_evaluation_draws_nothing(self, policy: SecondExpertPolicy) -> None:
        logits = torch.randn(50, 5)
        before = torch.get_rng_state()
        decisions = [decide(logits, policy=policy, training=False) for _ in range(2)]
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(decisions[0].expert_ids_TK, decisions[1].expert_ids_TK)
        assert torch.equal(decisions[0].requested_TK, decisions[1].requested_TK)
        second = logits.topk(2).indices[:, 1]
        assert torch.equal(decisions[0].expert_ids_TK[:, 1], second)

    def test_random_in_evaluation_keeps_weights_from_a_quarter(self) -> None:
        gates = torch.tensor([[0.75, 0.25, 0.0], [0.76, 0.24, 0.0], [0.5, 0.5, 0.0]])
        decision = branch.decide_top2(
            gates.log().clamp(min=-50),
            gates,
            capacity=None,
            policy=SecondExpertPolicy.RANDOM,
            training=False,
        )
        assert decision.requested_TK[:, 1].tolist() == [True, False, True]

    def test_policy_all_draws_nothing_in_training(self) -> None:
        before = torch.get_rng_state()
        decide(torch.zeros(5, 5))
        assert torch.equal(before, torch.get_rng_state())


def test_remembered_decision_is_obeyed() -> None:
    router = Router(model_dim=4, num_experts=4, config=BranchConfig(second_expert_policy=ALL))
    x = torch.randn(6, 4)
    first = router(x, tokens=TokenInfo(mode=RouterMode.TRAIN)).decision
    again = router(-x, tokens=TokenInfo(mode=RouterMode.TRAIN), decision=first)
    assert again.decision is first


def test_count_ids() -> None:
    assert contract.count_ids(torch.tensor([2, 0, 2]), size=4).tolist() == [1, 0, 2, 0]
    assert contract.count_ids(torch.empty(0, dtype=torch.int64), size=2).tolist() == [0, 0]


def test_no_expert_bias() -> None:
    router = Router(model_dim=4, num_experts=2, config=BranchConfig(), balance=BiasConfig(rule=BiasRule.SIGN))
    with pytest.raises(ValueError, match="no expert bias"):
        router(torch.randn(3, 4), tokens=TokenInfo(mode=RouterMode.TRAIN))
