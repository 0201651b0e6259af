"""Megatron's arguments: defaults, and what each of them changes; from values to the routing rule."""

from typing import Any

import pytest
import torch

from fairseq_moe.flags.megatron import moe_layer_pattern
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.moe_checks import expert_problems
from fairseq_moe.modules import BranchConfig, TopKConfig
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.capacity import DropPolicy
from fairseq_moe.modules.routing.scores import GroupScore, ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice
from tests.helpers.megatron import FACTOR, GROUPS, LAYERS, SIGMOID, config, problems


def rule(**given: Any) -> TopKConfig:
    found = config(**given).router_config()
    assert isinstance(found, TopKConfig)
    return found


# --- defaults ---


def test_defaults_are_those_of_megatron() -> None:
    assert rule() == TopKConfig(
        score=ScoreRule(top_k=2, function=ScoreFunction.SOFTMAX, pre_softmax=False, scaling_factor=1.0),
        choice=Choice.TOKEN,
        capacity=CapacityConfig(factor=None, minimum=0, policy=DropPolicy.PROBS),
        aux_losses=frozenset(),  # aux_loss with the coefficient 0
    )
    moe = config()
    assert moe.enabled and moe.num_experts == 8 and moe.top_k == 2 and moe.expert_dim is None
    assert [moe.is_moe_layer(index) for index in range(LAYERS)] == [True] * LAYERS
    assert moe.megatron.balancing_types == ["aux_loss"]
    assert moe.loss_coefficients == {}
    scorer = moe.scorer_config()
    assert (scorer.cosine, scorer.dtype, scorer.jitter_eps, moe.bias_config()) == (False, None, None, None)
    assert problems() == []


def test_two_defaults_differ_from_megatron() -> None:
    # There: allgather, and one rank per group of experts.
    assert config().megatron.dispatcher == "alltoall"
    assert config().megatron.expert_model_parallel_size is None  # min(ranks, experts)
    assert config(expert_model_parallel_size=1).megatron.expert_model_parallel_size == 1


@pytest.mark.parametrize("unset", [{}, {"num_experts": None}])
def test_without_number_of_experts_the_branch_decides(unset: dict[str, Any]) -> None:
    moe = MoEConfig.from_args({"moe_freq": 2, "moe_expert_count": 4, "decoder_layers": LAYERS, **unset})
    assert moe.router_config() == BranchConfig()
    assert moe.loss_coefficients == {}
    assert [moe.is_moe_layer(index) for index in range(LAYERS)] == [False, True, False, True]
    assert expert_problems(moe, num_layers=LAYERS, world_size=2) == []


# --- what each argument changes ---


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        ({"moe_router_topk": 3}, "score.top_k", 3),
        ({"moe_router_topk": 1, "moe_router_pre_softmax": True}, "score.pre_softmax", True),
        ({"moe_router_score_function": "sigmoid"}, "score.function", ScoreFunction.SIGMOID),
        ({"moe_router_score_function": "sqrtsoftplus"}, "score.function", ScoreFunction.SQRT_SOFTPLUS),
        ({"moe_router_topk_scaling_factor": 2.5}, "score.scaling_factor", 2.5),
        (GROUPS, "score.num_groups", 4),
        (GROUPS, "score.group_topk", 2),
        (GROUPS | {"moe_router_group_score": "max"}, "score.group_score", GroupScore.MAXIMUM),
        (GROUPS | {"moe_router_group_score": "best_two"}, "score.group_score", GroupScore.BEST_TWO),
        ({"moe_router_load_balancing_type": "none"}, "choice", Choice.TOKEN),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "choice", Choice.SINKHORN),
        ({"moe_router_load_balancing_type": "expert_choice"}, "choice", Choice.EXPERT),
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "choice", Choice.TOKEN),
        ({"moe_router_force_load_balancing": "random"}, "choice", Choice.RANDOM),
        ({"moe_router_force_load_balancing": "round_robin"}, "choice", Choice.ROUND_ROBIN),
        ({"moe_router_force_load_balancing": "hash"}, "choice", Choice.HASH),
        ({"moe_expert_capacity_factor": 1.25}, "capacity.factor", 1.25),
        ({"moe_expert_capacity_factor": -1.0}, "capacity.factor", None),
        (FACTOR | {"moe_expert_capacity_minimum": 4}, "capacity.minimum", 4),
        (FACTOR | {"moe_expert_capacity_warmup_updates": 200}, "capacity.num_warmup_updates", 200),
        (FACTOR | {"moe_token_drop_policy": "position"}, "capacity.policy", DropPolicy.POSITION),
        (FACTOR | {"moe_token_drop_policy": "prioritized"}, "capacity.policy", DropPolicy.PRIORITIZED),
        ({"batch_size": 2, "tokens_per_sample": 15}, "capacity.max_tokens", 32),
        ({"batch_size": None, "tokens_per_sample": 16}, "capacity.max_tokens", None),
        ({"moe_aux_loss_coeff": "0.01"}, "aux_losses", {"aux"}),
        ({"moe_z_loss_coeff": 1e-3}, "aux_losses", {"z"}),
        ({"moe_z_loss_coeff": 0.0, "moe_aux_loss_coeff": "0"}, "aux_losses", set()),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": "1e-4"},
            "aux_losses",
            {"seq_aux"},
        ),
        (
            {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": "1e-4"},
            "aux_losses",
            {"global_aux"},
        ),
    ],
    ids=str,
)
def test_argument_reaches_the_rule(given: dict[str, Any], path: str, value: Any) -> None:
    found: Any = rule(**given)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert problems(**given) == []


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"moe_input_jitter_eps": 0.1}, "jitter_eps", 0.1),
        ({"moe_router_dtype": "fp32"}, "dtype", torch.float32),
        ({"moe_router_dtype": "fp64"}, "dtype", torch.float64),
        ({"use_xmoe": True}, "cosine", True),
        ({"moe_router_bias": True}, "bias", True),
    ],
    ids=str,
)
def test_argument_reaches_the_scorer(given: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(config(**given).scorer_config(), name) == value
    assert problems(**given) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"moe_router_enable_expert_bias": True}, BiasConfig(rule=BiasRule.SIGN, update_rate=1e-3)),
        (SIGMOID | {"moe_router_enable_expert_bias": True}, BiasConfig(rule=BiasRule.SIGN, update_rate=1e-3)),
        (
            SIGMOID | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
            BiasConfig(rule=BiasRule.SIGN, update_rate=0.01),
        ),
        (
            {"moe_router_load_balancing_type": "quantile_balancing"},
            BiasConfig(rule=BiasRule.QUANTILE, update_rate=1e-3),
        ),
    ],
    ids=str,
)
def test_argument_reaches_the_bias(given: dict[str, Any], expected: BiasConfig | None) -> None:
    assert config(**given).bias_config() == expected
    assert problems(**given) == []


@pytest.mark.parametrize(
    "given", [{"moe_input_jitter_eps": 0.1}, {"moe_router_dtype": "fp64"}, {"use_xmoe": True}]
)
def test_scorer_arguments_go_with_the_gates_of_the_branch(given: dict[str, Any]) -> None:
    branch = {"num_experts": None, "moe_freq": 2, "moe_expert_count": 4}
    assert problems(**branch, **given) == []
    assert config(**branch, **given).scorer_config() == config(**given).scorer_config()


@pytest.mark.parametrize(
    ("given", "dispatcher"),
    [
        ({}, "alltoall"),
        ({"moe_token_dispatcher_type": "alltoall"}, "alltoall"),
        ({"moe_token_dispatcher_type": "alltoall_seq"}, "alltoall"),
        ({"moe_token_dispatcher_type": "flex"}, "alltoall"),
        ({"moe_token_dispatcher_type": "deepep"}, "alltoall"),
        ({"moe_token_dispatcher_type": "hybridep"}, "alltoall"),
        ({"moe_token_dispatcher_type": "allgather"}, "allgather"),
        (FACTOR | {"moe_pad_expert_input_to_capacity": True}, "padded"),
    ],
)
def test_dispatcher(given: dict[str, Any], dispatcher: str) -> None:
    assert config(**given).megatron.dispatcher == dispatcher
    assert problems(**given) == []


def test_several_losses_have_own_coefficients() -> None:
    types = {"moe_router_load_balancing_type": "aux_loss seq_aux_loss global_aux_loss"}
    assert config(**types, moe_aux_loss_coeff="0.1 0.2 0").loss_coefficients == {"aux": 0.1, "seq_aux": 0.2}
    same = {"aux": 0.1, "seq_aux": 0.1, "global_aux": 0.1, "z": 0.5}
    assert config(**types, moe_aux_loss_coeff="0.1", moe_z_loss_coeff=0.5).loss_coefficients == same
    commas = {"moe_router_load_balancing_type": "[aux_loss,seq_aux_loss]"}
    assert config(**commas, moe_aux_loss_coeff="0.1,0.2").loss_coefficients == {"aux": 0.1, "seq_aux": 0.2}


def test_widths_and_sizes() -> None:
    assert config(moe_ffn_hidden_size=24).expert_dim == 24
    shared = {"moe_shared_expert_intermediate_size": 48, "moe_shared_expert_gate": True}
    assert config(**shared).megatron.moe_shared_expert_intermediate_size == 48
    assert problems(**shared, moe_ffn_hidden_size=24) == []
    assert problems(world_size=4, expert_model_parallel_size=2) == []
    assert problems(world_size=4, expert_model_parallel_size=3) == [
        "--expert-model-parallel-size is 3, expected a divisor of both the 8 experts and the 4 ranks."
    ]


# --- layers ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", [1, 1, 1, 1]),
        ("2", [1, 0, 1, 0]),  # Megatron's rule: index % N == 0; --moe-freq has (index + 1) % N == 0
        ("3", [1, 0, 0, 1]),
        ("[0, 1, 1, 0]", [0, 1, 1, 0]),
        ("([0]+[1]*3)", [0, 1, 1, 1]),
        ("([0]*1+[1,0]*1+[1]*1)", [0, 1, 0, 1]),
        ("2*[0,1]", [0, 1, 0, 1]),
    ],
)
def test_layer_pattern(text: str, expected: list[int]) -> None:
    moe = config(moe_layer_freq=text)
    assert [moe.is_moe_layer(index) for index in range(4)] == [bool(mark) for mark in expected]
    assert problems(moe_layer_freq=text) == []


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "[1]", "[0,1,2,0]", "[1]*5", "[[1],[1],[1],[1]]", "True", "1.5", "many", "[1]*", "f()",
     "__import__('os')", "[0]*1000000000000", "1+[1]", "\0"],
)  # fmt: skip
def test_layer_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number N or 4 zeros and ones such as"):
        moe_layer_pattern(text, 4)
    (problem,) = problems(moe_layer_freq=text)
    assert problem.startswith(f"--moe-layer-freq is {text!r}")


def test_a_pattern_without_experts_is_refused() -> None:
    assert problems(moe_layer_freq="[0]*4") == [
        "--moe-layer-freq [0]*4 gives no layer experts; mark at least one."
    ]
