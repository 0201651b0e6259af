"""From Megatron's arguments to a layer that acts on them: widths, dispatchers, router, shared experts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe.distributed import ParallelMesh
from fairseq_moe.models.decoder_layer import build_moe_layer
from fairseq_moe.modules import LocalDispatcher, MoELayer, RouterMode, TokenInfo
from fairseq_moe.modules.dispatch.allgather import AllGatherDispatcher
from fairseq_moe.modules.dispatch.dispatcher import plan_kept
from fairseq_moe.modules.dispatch.padded import plan_padded
from fairseq_moe.parallel.experts import ExpertLayout
from tests.helpers.layer_stats import load_of
from tests.helpers.megatron import FACTOR, SIGMOID, config

D, F = 8, 12


def build(**given: Any) -> MoELayer:
    torch.manual_seed(0)
    layout = ExpertLayout(num_experts=8, world_size=1)
    return build_moe_layer(
        config(**given),
        ParallelMesh(layout=layout, rank=0),
        model_dim=D,
        hidden_dim=config(**given).expert_dim or F,
        activation=torch.relu,
        activation_dropout=0.0,
        dropout=0.0,
    )


def run(layer: MoELayer, mode: RouterMode = RouterMode.TRAIN) -> tuple[Tensor, Any]:
    x = torch.randn(16, D, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(16)
    return layer(x, tokens=TokenInfo(mode=mode, ids_T=ids, num_sequences=2))


@pytest.mark.parametrize(
    ("given", "kind", "plan"),
    [
        ({}, LocalDispatcher, plan_kept),
        ({"moe_token_dispatcher_type": "alltoall_seq"}, LocalDispatcher, plan_kept),
        ({"moe_token_dispatcher_type": "allgather"}, AllGatherDispatcher, None),
        (FACTOR | {"moe_pad_expert_input_to_capacity": True}, LocalDispatcher, plan_padded),
    ],
    ids=["default", "alltoall_seq", "allgather", "padded"],
)
def test_dispatchers(given: dict[str, Any], kind: type, plan: Any) -> None:
    layer = build(**given)
    assert type(layer.dispatcher) is kind
    assert getattr(layer.dispatcher, "plan", None) is plan
    y, _ = run(layer)
    factor = {name: given[name] for name in given if name in FACTOR}
    torch.testing.assert_close(y, run(build(**factor))[0])


@pytest.mark.parametrize("factor", [0.5, 1.0, 20.0])
def test_padded_expert_choice(factor: float) -> None:
    given = {"moe_router_load_balancing_type": "expert_choice", "moe_expert_capacity_factor": factor}
    padded = build(**given, moe_pad_expert_input_to_capacity=True)
    for mode in RouterMode:
        torch.testing.assert_close(run(padded, mode)[0], run(build(**given), mode)[0])


def test_widths() -> None:
    assert build(moe_ffn_hidden_size=20).experts.fc1_weight.shape[0] == 8
    assert 20 in build(moe_ffn_hidden_size=20).experts.fc1_weight.shape
    layer = build(moe_shared_expert_intermediate_size=24, moe_shared_expert_gate=True)
    assert layer.shared_experts is not None
    assert layer.shared_experts.fc1.weight.shape == (24, D)
    assert layer.shared_experts.gate is not None
    assert build().shared_experts is None


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_top_k(top_k: int) -> None:
    _, aux = run(build(moe_router_topk=top_k, moe_router_pre_softmax=True))
    assert load_of(aux).sum(1).tolist() == [16.0 * top_k] * 2


# Arguments and what they do to the loads before and after the capacity cut.
_LOADS: list[tuple[dict[str, Any], Any]] = [
    (FACTOR, lambda wanted, kept: kept.max() <= 4 < wanted.max()),
    ({"moe_expert_capacity_factor": -1.0}, lambda wanted, kept: kept.equal(wanted)),
    (FACTOR | {"moe_expert_capacity_minimum": 16}, lambda wanted, kept: kept.equal(wanted)),
    (FACTOR | {"moe_expert_capacity_warmup_updates": 0}, lambda wanted, kept: kept.equal(wanted)),
    ({"moe_router_load_balancing_type": "expert_choice"}, lambda wanted, kept: kept.eq(4).all()),
    ({"moe_router_force_load_balancing": "round_robin"}, lambda wanted, kept: kept.eq(4).all()),
    (
        {"moe_router_load_balancing_type": "sinkhorn"},
        lambda wanted, kept: wanted.std() < load_of(run(build())[1])[0].std(),
    ),
]


@pytest.mark.parametrize(("given", "holds"), _LOADS, ids=[str(given) for given, _ in _LOADS])
def test_loads(given: dict[str, Any], holds: Any) -> None:
    wanted, kept = load_of(run(build(**given))[1])
    assert wanted.sum() == 32
    assert holds(wanted, kept)


@pytest.mark.parametrize(
    "given",
    [
        {"moe_router_pre_softmax": True},
        {"moe_router_topk_scaling_factor": 2.0},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_score_function": "sqrtsoftplus"},
        {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_force_load_balancing": "hash"},
        {"moe_router_force_load_balancing": "random"},
        {"moe_input_jitter_eps": 0.3},
        {"use_xmoe": True},
        FACTOR | {"moe_token_drop_policy": "position"},
        FACTOR | {"moe_token_drop_policy": "prioritized"},
        {"moe_shared_expert_intermediate_size": 24},
    ],
    ids=str,
)
def test_outputs_change(given: dict[str, Any]) -> None:
    rest = {name: value for name, value in given.items() if name in FACTOR or name == "moe_router_topk"}
    assert not torch.allclose(run(build(**given))[0], run(build(**rest))[0], atol=1e-4)


def test_scaling_multiplies_the_output() -> None:
    layer, scaled = build(), build(moe_router_topk_scaling_factor=2.0)
    torch.testing.assert_close(run(scaled)[0], 2 * run(layer)[0])


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_precision_of_the_router(dtype: str) -> None:
    layer = build(moe_router_dtype=dtype)
    seen = []
    layer.router.register_forward_hook(lambda module, args, output: seen.append(output.gates_TE.dtype))
    run(layer)
    assert seen == [{"fp32": torch.float32, "fp64": torch.float64}[dtype]]


def test_biases_exist_where_they_were_asked_for() -> None:
    assert build().router.expert_bias is None
    layer = build(**SIGMOID, moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.5)
    run(layer)
    layer.router.update_bias()
    assert layer.router.expert_bias is not None
    assert set(layer.router.expert_bias.tolist()) <= {-0.5, 0.0, 0.5}
    assert layer.router.expert_bias.abs().sum() > 0
    layer = build(moe_router_load_balancing_type="quantile_balancing")
    run(layer)
    layer.router.update_bias()
    assert load_of(run(layer)[1])[0].std() < load_of(run(build())[1])[0].std()


@pytest.mark.parametrize(
    ("given", "losses"),
    [
        ({}, []),
        ({"moe_aux_loss_coeff": "0.1"}, ["aux"]),
        ({"moe_z_loss_coeff": 0.1}, ["z"]),
        (
            {
                "moe_router_load_balancing_type": "seq_aux_loss global_aux_loss",
                "moe_aux_loss_coeff": "0.1 0.1",
            },
            ["seq_aux", "global_aux"],
        ),
    ],
    ids=str,
)
def test_losses(given: dict[str, Any], losses: list[str]) -> None:
    from fairseq_moe.modules import LOSSES

    _, aux = run(build(**given))
    found = [name for name, value in zip(LOSSES, aux.losses.tolist(), strict=True) if value != 0]
    assert found == losses
