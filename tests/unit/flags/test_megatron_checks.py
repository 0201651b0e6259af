"""Megatron's arguments: every combination that is refused, with its sentence."""

from typing import Any

import pytest

from tests.helpers.megatron import FACTOR, GROUPS, SIGMOID, problems

_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 0}, "--num-experts is 0, expected at least 1"),
    ({"num_experts": -2}, "--num-experts is -2"),
    ({"num_experts": 3}, "3 experts do not fit 2 ranks"),
    ({"moe_router_topk": 9}, "--moe-router-topk is 9, expected 1 to 8"),
    ({"moe_router_topk": 0}, "--moe-router-topk is 0"),
    ({"moe_router_topk": 1}, "gives it weight 1 and the router no gradient"),
    ({"moe_router_score_function": "tanh"}, "'tanh', expected one of softmax, sigmoid, sqrtsoftplus"),
    ({"moe_router_topk_scaling_factor": 0.0}, "--moe-router-topk-scaling-factor is 0.0"),
    (SIGMOID | {"moe_router_bias_update_rate": 0.1}, "needs --moe-router-enable-expert-bias"),
    (
        {"moe_router_bias": True, "use_xmoe": True},
        "--moe-router-bias is of a linear router, which --use-xmoe",
    ),
    (
        SIGMOID | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0},
        "--moe-router-bias-update-rate is 0.0",
    ),
    (
        SIGMOID
        | {"moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "quantile_balancing"},
        "both set the bias",
    ),
    (GROUPS | {"moe_router_load_balancing_type": "quantile_balancing"}, "quantile_balancing compares all"),
    ({"moe_router_force_load_balancing": "lru"}, "'lru', expected one of random, round_robin, hash"),
    (
        {"moe_router_force_load_balancing": "hash", "moe_router_load_balancing_type": "sinkhorn"},
        "--moe-router-force-load-balancing replaces the tokens' choice",
    ),
    ({"moe_router_num_groups": 4}, "go together; give both"),
    ({"moe_router_group_topk": 4}, "go together; give both"),
    ({"moe_router_group_score": "max"}, "--moe-router-group-score needs"),
    (GROUPS | {"moe_router_num_groups": 3}, "--moe-router-num-groups is 3, expected a divisor of the 8"),
    (GROUPS | {"moe_router_group_topk": 5}, "--moe-router-group-topk is 5, expected 1 to 4"),
    (GROUPS | {"moe_router_topk": 5}, "more than the 4 experts of 2 groups"),
    (GROUPS | {"moe_router_group_score": "mean"}, "'mean', expected one of sum, best_two, max"),
    (GROUPS | {"moe_router_topk": 1, "moe_router_pre_softmax": True}, "sums the best 0 of a group's 2"),
    (
        {"moe_router_num_groups": 8, "moe_router_group_topk": 2, "moe_router_group_score": "best_two"},
        "sums the best 2 of a group's 1 experts",
    ),
    ({"moe_router_load_balancing_type": "luck"}, "is luck, expected one or several of aux_loss"),
    ({"moe_router_load_balancing_type": "aux_loss none"}, "only aux_loss, seq_aux_loss and global_aux_loss"),
    ({"moe_router_load_balancing_type": "aux_loss aux_loss"}, "names a loss twice"),
    ({"moe_aux_loss_coeff": "big"}, "--moe-aux-loss-coeff is 'big', expected one or several numbers"),
    ({"moe_aux_loss_coeff": "0.1 0.2"}, "has 2 numbers, expected 1 or 1"),
    ({"moe_aux_loss_coeff": "-1"}, "--moe-aux-loss-coeff is -1, expected finite weights"),
    ({"moe_aux_loss_coeff": "nan"}, "--moe-aux-loss-coeff is nan"),
    ({"moe_z_loss_coeff": -1.0}, "--moe-z-loss-coeff is -1.0"),
    ({"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": "0.1"}, "has no loss to weigh"),
    ({"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": "0.1"}, "has no loss to weigh"),
    ({"moe_expert_capacity_factor": 0.0}, "--moe-expert-capacity-factor is 0.0"),
    ({"moe_expert_capacity_factor": float("inf")}, "--moe-expert-capacity-factor is inf"),
    ({"moe_pad_expert_input_to_capacity": True}, "needs a positive --moe-expert-capacity-factor"),
    (
        {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": -1.0},
        "needs a positive --moe-expert-capacity-factor",
    ),
    ({"moe_token_drop_policy": "probs"}, "needs a positive --moe-expert-capacity-factor"),
    ({"moe_expert_capacity_minimum": 4}, "needs a positive --moe-expert-capacity-factor"),
    ({"moe_expert_capacity_warmup_updates": 4}, "needs a positive --moe-expert-capacity-factor"),
    (FACTOR | {"moe_expert_capacity_minimum": -1}, "--moe-expert-capacity-minimum is -1"),
    (FACTOR | {"moe_expert_capacity_warmup_updates": -1}, "--moe-expert-capacity-warmup-updates is -1"),
    (FACTOR | {"moe_token_drop_policy": "luck"}, "'luck', expected one of probs, position, prioritized"),
    (FACTOR | {"moe_router_load_balancing_type": "sinkhorn"}, "leave out --moe-expert-capacity-factor"),
    (SIGMOID | {"moe_router_load_balancing_type": "sinkhorn"}, "leave out --moe-router-score-function"),
    (
        FACTOR | {"moe_router_load_balancing_type": "expert_choice", "moe_token_drop_policy": "probs"},
        "leave out --moe-token-drop-policy",
    ),
    (GROUPS | {"moe_router_load_balancing_type": "expert_choice"}, "leave out --moe-router-num-groups"),
    (
        FACTOR | {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_warmup_updates": 2},
        "gives up; choose one",
    ),
    (
        FACTOR | {"moe_pad_expert_input_to_capacity": True, "moe_token_dispatcher_type": "allgather"},
        "leave out --moe-token-dispatcher-type allgather",
    ),
    ({"moe_token_dispatcher_type": "pigeon"}, "'pigeon', expected one of alltoall, allgather"),
    ({"moe_token_dispatcher_type": "allgather", "dummy_a2a": True}, "--dummy-a2a leaves out the exchange"),
    ({"moe_input_jitter_eps": 1.0}, "--moe-input-jitter-eps is 1.0, expected 0 <= eps < 1"),
    ({"moe_input_jitter_eps": float("nan")}, "--moe-input-jitter-eps is nan"),
    ({"moe_router_dtype": "bf16"}, "'bf16', expected one of fp32, fp64"),
    ({"moe_ffn_hidden_size": 0}, "--moe-ffn-hidden-size is 0, expected a positive width"),
    ({"moe_shared_expert_intermediate_size": 0}, "--moe-shared-expert-intermediate-size is 0"),
    ({"moe_shared_expert_gate": True}, "needs --moe-shared-expert-intermediate-size"),
    (
        {"moe_token_capacity_factor": 1.0, "moe_expert_capacity_factor": 2.0},
        "--moe-token-capacity-factor 1.0 contradicts --moe-expert-capacity-factor 2.0",
    ),
]


@pytest.mark.parametrize(("given", "sentence"), _REFUSED, ids=str)
def test_refused(given: dict[str, Any], sentence: str) -> None:
    (problem,) = problems(**given)
    assert sentence in problem
    assert problem.endswith(".")


@pytest.mark.parametrize(
    ("flag", "value", "instead"),
    [
        ("moe_expert_count", 4, "--num-experts"),
        ("moe_freq", 2, "--moe-layer-freq"),
        ("moe_expert_ffn_dim", 8, "--moe-ffn-hidden-size"),
        ("moe_top1_expert", True, "--moe-router-topk 1"),
        ("moe_second_expert_policy", "all", "--moe-router-topk"),
        ("moe_normalize_gate_prob_before_dropping", True, "--moe-router-pre-softmax"),
        ("moe_batch_prioritized_routing", True, "--moe-token-drop-policy prioritized"),
        ("moe_eval_capacity_token_fraction", -1.0, "--moe-expert-capacity-factor"),
        ("moe_generation_capacity_token_fraction", 0.5, "--moe-expert-capacity-factor"),
    ],
)
def test_flags_of_the_branch_are_refused_beside_megatron(flag: str, value: Any, instead: str) -> None:
    found = [
        sentence
        for sentence in problems(**{flag: value})
        if f"--{flag.replace('_', '-')} belongs" in sentence
    ]
    assert len(found) == 1
    assert found[0].endswith(f"use {instead} instead.")


@pytest.mark.parametrize(
    "given",
    [
        {"moe_gate_loss_wt": 0.01},
        {"moe_gate_loss_combine_method": "sum"},
        {"moe_gate_loss_transform": "neg_log"},
    ],
)
def test_weight_of_the_branch_loss_is_refused_beside_megatron(given: dict[str, Any]) -> None:
    (problem,) = problems(criterion=given)
    assert "use --moe-aux-loss-coeff instead" in problem
    assert problems(criterion={"moe_gate_loss_wt": 1.0, "moe_gate_loss_combine_method": "average"}) == []


# --- arguments without their model ---


@pytest.mark.parametrize(
    "given",
    [
        {"moe_router_topk": 4},
        {"moe_router_pre_softmax": True},
        {"moe_aux_loss_coeff": "0.1"},
        {"moe_layer_freq": "2"},
        {"moe_ffn_hidden_size": 8},
        {"moe_router_bias": True},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_token_capacity_factor": 1.0},
        {"moe_router_force_load_balancing": "random"},
    ],
    ids=str,
)
def test_routing_arguments_need_the_number_of_experts(given: dict[str, Any]) -> None:
    for model in ({"num_experts": None}, {"num_experts": None, "moe_freq": 2, "moe_expert_count": 4}):
        (problem,) = problems(**model, **given)
        assert "describe Megatron's routing, which --num-experts N selects" in problem


@pytest.mark.parametrize(
    "given",
    [
        {"moe_input_jitter_eps": 0.1},
        {"moe_router_dtype": "fp32"},
        {"use_xmoe": True},
        {"moe_shared_expert_intermediate_size": 8},
        {"moe_token_dispatcher_type": "allgather"},
        {"expert_model_parallel_size": 2},
    ],
    ids=str,
)
def test_arguments_about_experts_need_experts(given: dict[str, Any]) -> None:
    (problem,) = problems(num_experts=None, **given)
    assert "concern experts, and no layer has any" in problem
    assert problems(num_experts=None) == []
