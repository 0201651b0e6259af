"""Recomputed MoE layers: the same numbers, counted once, and less kept for the backward pass.

Run with ``pytest tests/unit/modules/test_recompute.py``; with ranks and FSDP in
``tests/distributed/test_recompute.py``.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.moe_checks import expert_problems
from fairseq_moe.modules import (
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    SharedExperts,
    TokenInfo,
)
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.modules.recompute import RECOMPUTABLE
from tests.helpers.layer_stats import load_of, stats_of

T, D, HIDDEN, E = 48, 8, 32, 4
FLAGS = {
    "num_experts": E, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "aux_loss,seq_aux_loss,global_aux_loss", "moe_aux_loss_coeff": "0.1",
    "moe_z_loss_coeff": 0.01, "moe_expert_capacity_factor": 1.0, "moe_input_jitter_eps": 0.2,
}  # fmt: skip
BRANCH = {"moe_freq": 1, "moe_expert_count": E, "moe_input_jitter_eps": 0.2}
FORCED = {"num_experts": E, "moe_router_force_load_balancing": "random"}
WHOLE = ["moe"]
PARTS = ["experts", "shared_experts"]


def make_layer(flags: dict[str, Any] = FLAGS, *, dropout: float = 0.3, hidden: int = HIDDEN) -> MoELayer:
    torch.manual_seed(0)
    moe = MoEConfig.from_args(flags)
    networks = {"activation": F.gelu, "activation_dropout": dropout, "dropout": dropout}
    return MoELayer(
        router=Router(
            model_dim=D,
            num_experts=E,
            config=moe.router_config(),
            scorer=moe.scorer_config(),
            balance=moe.bias_config(),
        ),
        experts=Experts(num_local_experts=E, first_expert_id=0, model_dim=D, hidden_dim=hidden, **networks),
        shared_experts=SharedExperts(model_dim=D, hidden_dim=hidden, gated=True, **networks),
        dispatcher=LocalDispatcher(),
    )


def set_recompute(layer: MoELayer, parts: list[str]) -> None:
    assert layer.shared_experts is not None
    layer.recompute = "moe" in parts
    layer.experts.recompute = "experts" in parts
    layer.shared_experts.recompute = "shared_experts" in parts


def train_pass(
    layer: MoELayer, recompute: list[str], *, mode: RouterMode = RouterMode.TRAIN
) -> dict[str, Tensor]:
    """Two micro-batches of one update on a copy of ``layer``: outputs, losses, gradients, counters, bias."""
    layer = copy.deepcopy(layer).train(mode is RouterMode.TRAIN)
    set_recompute(layer, recompute)
    found: dict[str, Tensor] = {}
    layer.router.begin_update()
    torch.manual_seed(3)
    for micro in range(2):
        x = torch.randn(T, D, requires_grad=True)
        padding_T = torch.arange(T) % 8 == 7
        y, aux = layer(x, tokens=TokenInfo(mode=mode, padding_T=padding_T, num_sequences=4))
        (y.square().sum() + (aux.losses * torch.arange(1.0, 6.0)).sum()).backward()
        assert x.grad is not None
        found |= {f"y{micro}": y, f"losses{micro}": aux.losses, f"stats{micro}": stats_of(aux)}
        found |= {f"load{micro}": load_of(aux), f"x{micro}": x.grad}
    found["random numbers"] = torch.rand(3)  # the generator is where it would be
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.router.update_bias()
    if layer.router.expert_bias is not None:
        found["bias after the update"] = layer.router.expert_bias
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize("flags", [FLAGS, BRANCH, FORCED], ids=["megatron", "branch", "forced"])
@pytest.mark.parametrize("recompute", [WHOLE, PARTS, PARTS[:1]], ids=" ".join)
def test_outputs_gradients_losses_counters_and_bias_are_the_same(
    recompute: list[str], flags: dict[str, Any]
) -> None:
    """With dropout, jitter and drops."""
    layer = make_layer(flags)
    expected, found = train_pass(layer, []), train_pass(layer, recompute)
    assert found.keys() == expected.keys()
    if flags is FLAGS:
        assert float(expected["stats0"][11]) > 0, "nothing was dropped"
        assert expected["router.local_counts_E"].sum() == 2 * T * 7 // 8 * 2
        assert expected["bias after the update"].any()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("recompute", [WHOLE, PARTS], ids=" ".join)
def test_evaluation_is_the_same_and_leaves_counters_alone(recompute: list[str]) -> None:
    layer = make_layer()
    expected, found = (train_pass(layer, parts, mode=RouterMode.EVAL) for parts in ([], recompute))
    assert not found["router.local_counts_E"].any()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_choice_is_remembered_and_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    set_recompute(layer, WHOLE)
    decisions = []
    stock_route = layer.router.rule.route

    def route(logits: Tensor, tokens: TokenInfo, decision: Any, **options: Any) -> Any:
        decisions.append(decision)
        return stock_route(logits, tokens, decision, **options)

    monkeypatch.setattr(layer.router.rule, "route", route)
    y, _ = layer(torch.randn(T, D, requires_grad=True), tokens=TokenInfo(mode=RouterMode.TRAIN))
    y.sum().backward()
    assert [decision is None for decision in decisions] == [True, False]


def test_where_the_whole_decoder_layer_is_recomputed_its_moe_layer_is_not_once_more() -> None:
    layer = make_layer()
    set_recompute(layer, WHOLE)
    calls = []
    layer.experts.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(T, D, requires_grad=True)
    layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN), memo=RoutingMemo())[0].sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("recompute", [WHOLE, PARTS], ids=" ".join)
def test_parameters_get_gradients_when_the_input_wants_none(recompute: list[str]) -> None:
    layer = make_layer()
    set_recompute(layer, recompute)
    layer(torch.randn(T, D), tokens=TokenInfo(mode=RouterMode.TRAIN))[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def kept_bytes(recompute: list[str]) -> int:
    """What the forward pass keeps for the backward pass, parameters not counted."""
    layer = make_layer(hidden=16 * D)
    set_recompute(layer, recompute)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # keeps it alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(T, D, requires_grad=True), tokens=TokenInfo(mode=RouterMode.TRAIN))
    return sum(storage.nbytes() for storage in storages.values())


def test_every_choice_keeps_less() -> None:
    everything = kept_bytes([])
    saved = {part: everything - kept_bytes([part]) for part in RECOMPUTABLE}
    hidden = 16 * D * 4  # bytes of one row's hidden activation
    assert saved["shared_experts"] >= T * hidden
    assert saved["experts"] >= 1.5 * T * hidden  # two rows per token, some of them dropped
    assert kept_bytes(WHOLE) == T * D * 4
    assert saved["moe"] > saved["experts"] + saved["shared_experts"]


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"moe_layer_recompute": True}, {"moe"}),
            ({"moe_recompute_modules": "moe"}, {"moe"}),
            ({"moe_recompute_modules": "experts, shared_experts"}, {"experts", "shared_experts"}),
            ({}, set()),
        ],
    )
    def test_meaning(self, flags: dict[str, Any], expected: set[str]) -> None:
        assert MoEConfig.from_args(flags).recompute_modules == expected

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ({"moe_recompute_modules": "everything"}, "expected one or several of moe, experts"),
            ({"moe_recompute_modules": "moe experts"}, "leave out its parts"),
            ({"moe_recompute_modules": "shared_experts"}, "--moe-shared-expert-intermediate-size"),
            ({"moe_layer_recompute": True, "checkpoint_activations": True}, "--checkpoint-activations"),
            ({"moe_layer_recompute": True, "num_experts": None}, "needs layers with experts"),
        ],
    )
    def test_refusals(self, flags: dict[str, Any], words: str) -> None:
        config = MoEConfig.from_args({"num_experts": E, "decoder_layers": 2, **flags})
        assert any(words in problem for problem in expert_problems(config, num_layers=2, world_size=1))
