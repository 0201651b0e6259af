"""Shared experts: their formula, their gate, and their place in the layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules import Experts, LocalDispatcher, MoELayer, Router, RouterMode, TokenInfo, TopKConfig
from fairseq_moe.modules.routing.scores import ScoreRule
from fairseq_moe.modules.shared_experts import SharedExperts

D, H, E = 6, 10, 4


def make_shared(*, gated: bool = False, dropout: float = 0.0) -> SharedExperts:
    torch.manual_seed(0)
    return SharedExperts(model_dim=D, hidden_dim=H, activation=F.gelu, gated=gated, dropout=dropout)


def by_hand(shared: SharedExperts, x: Tensor) -> Tensor:
    y = F.gelu(x @ shared.fc1.weight.t() + shared.fc1.bias) @ shared.fc2.weight.t() + shared.fc2.bias
    return y if shared.gate is None else y * torch.sigmoid(x @ shared.gate.weight.t())


@pytest.mark.parametrize("gated", [False, True])
def test_formula_and_gradients(gated: bool) -> None:
    shared, x = make_shared(gated=gated), torch.randn(5, D)
    torch.testing.assert_close(shared(x), by_hand(shared, x))
    shared(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in shared.parameters())


def test_dropout_in_training_only() -> None:
    shared, x = make_shared(dropout=0.5), torch.randn(50, D)
    assert (shared(x) == 0).any()
    torch.testing.assert_close(shared.eval()(x), by_hand(shared, x))


@pytest.mark.parametrize("gated", [False, True])
def test_added_to_the_experts_for_every_token(gated: bool) -> None:
    def layer(shared: SharedExperts | None) -> MoELayer:
        torch.manual_seed(1)
        return MoELayer(
            router=Router(model_dim=D, num_experts=E, config=TopKConfig(score=ScoreRule(top_k=2))),
            experts=Experts(
                num_local_experts=E, first_expert_id=0, model_dim=D, hidden_dim=8, activation=F.relu
            ),
            dispatcher=LocalDispatcher(),
            shared_experts=shared,
        )

    shared, x = make_shared(gated=gated), torch.randn(7, D)
    tokens = TokenInfo(mode=RouterMode.TRAIN, padding_T=torch.tensor([False] * 5 + [True] * 2))
    routed, _ = layer(None)(x, tokens=tokens)
    both, _ = layer(shared)(x, tokens=tokens)
    torch.testing.assert_close(both, routed + by_hand(shared, x))
    torch.testing.assert_close(both[5:], by_hand(shared, x[5:]))  # padding has no experts of its own
    assert not any(hasattr(parameter, "expert") for parameter in shared.parameters())
