"""The layer's behaviour at the edges: no tokens, padding, modes, remembered routing, auxiliary outputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules import (
    BranchConfig,
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    TokenInfo,
)
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.modules.routing.branch import SecondExpertPolicy
from tests.helpers.layer_stats import load_of, named_stats_of, stats_of

E, D = 4, 6


def make_layer(**config: object) -> MoELayer:
    torch.manual_seed(0)
    options: dict[str, object] = {"second_expert_policy": SecondExpertPolicy.ALL, **config}
    return MoELayer(
        router=Router(model_dim=D, num_experts=E, config=BranchConfig(**options)),  # type: ignore[arg-type]
        experts=Experts(num_local_experts=E, first_expert_id=0, model_dim=D, hidden_dim=8, activation=F.relu),
        dispatcher=LocalDispatcher(),
    )


def backward(layer: MoELayer, y: Tensor, balance_loss: Tensor) -> None:
    (y.sum() + balance_loss).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mode", list(RouterMode))
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("use_fp32", [False, True])
def test_no_tokens(mode: RouterMode, top_k: int, normalize_before: bool, use_fp32: bool) -> None:
    layer = make_layer(
        top_k=top_k,
        normalize_before_dropping=normalize_before,
        gating_use_fp32=use_fp32,
        batch_prioritized=True,
    )
    x = torch.empty(0, D, requires_grad=True)
    y, aux = layer(x, tokens=TokenInfo(mode=mode, padding_T=torch.empty(0, dtype=torch.bool)))
    assert y.shape == (0, D)
    assert float(aux.balance_loss.detach()) == 0
    assert stats_of(aux).isfinite().all()
    backward(layer, y, aux.balance_loss)
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_padding_gives_zeros_and_zero_gradients(top_k: int) -> None:
    layer = make_layer(top_k=top_k)
    x = torch.randn(5, D, requires_grad=True)
    y, aux = layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN, padding_T=torch.ones(5, dtype=torch.bool)))
    assert not y.any()
    assert not load_of(aux).any()
    assert stats_of(aux).isfinite().all()
    assert float(aux.balance_loss.detach()) == 0
    backward(layer, y, aux.balance_loss)
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_padding_does_not_change_other_tokens() -> None:
    layer = make_layer()
    x = torch.randn(8, D)
    padding = torch.tensor([False] * 5 + [True] * 3)
    with_padding = layer(x, tokens=TokenInfo(mode=RouterMode.GENERATE, padding_T=padding))[0]
    alone = layer(x[:5], tokens=TokenInfo(mode=RouterMode.GENERATE))[0]
    torch.testing.assert_close(with_padding[:5], alone)
    assert not with_padding[5:].any()


def test_generation_does_not_depend_on_neighbours() -> None:
    layer = make_layer(second_expert_policy=SecondExpertPolicy.SAMPLING)
    x = torch.randn(30, D)
    together = layer(x, tokens=TokenInfo(mode=RouterMode.GENERATE))[0]
    one_by_one = torch.cat([layer(row, tokens=TokenInfo(mode=RouterMode.GENERATE))[0] for row in x.split(1)])
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("policy", list(SecondExpertPolicy))
def test_evaluation_is_deterministic(policy: SecondExpertPolicy) -> None:
    layer = make_layer(second_expert_policy=policy)
    x = torch.randn(30, D)
    first, second = (layer(x, tokens=TokenInfo(mode=RouterMode.EVAL))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_dropped_tokens_come_out_as_zero() -> None:
    layer = make_layer(top_k=1)
    with torch.no_grad():
        layer.router.weight.zero_()[0] = 1.0
    x = torch.rand(8, D)  # positive: all choose expert 0, which takes ceil(8 / 4) = 2
    y, aux = layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert y[:2].any(-1).all()
    assert not y[2:].any()
    assert load_of(aux).tolist() == [[8, 0, 0, 0], [2, 0, 0, 0]]
    assert named_stats_of(aux)["drop_rate"] == 75


class TestMemo:
    def test_second_pass_obeys_the_first(self) -> None:
        layer = make_layer(second_expert_policy=SecondExpertPolicy.SAMPLING)
        x = torch.randn(64, D)
        memo = RoutingMemo()
        first = layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN), memo=memo)[0]
        again = layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN), memo=memo)[0]
        without = layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN))[0]
        assert torch.equal(first, again)
        assert not torch.equal(first, without)  # sampling drew other experts

    def test_a_near_tie_that_turns_keeps_the_choice_and_still_has_gradients(self) -> None:
        layer = make_layer()
        x = torch.randn(16, D)
        memo = RoutingMemo()
        layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN), memo=memo)
        chosen = memo.decision
        turned = (-x).requires_grad_()
        y, aux = layer(turned, tokens=TokenInfo(mode=RouterMode.TRAIN), memo=memo)
        assert memo.decision is chosen
        backward(layer, y, aux.balance_loss)
        assert turned.grad is not None and turned.grad.any()


def test_auxiliary_outputs_but_the_loss_carry_no_gradient() -> None:
    layer = make_layer()
    _, aux = layer(torch.randn(5, D), tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert aux.balance_loss.requires_grad
    assert not aux.measures_4.requires_grad
    assert not aux.histogram_34E.requires_grad


def test_frozen_experts_get_no_gradient_and_tokens_do() -> None:
    layer = make_layer()
    layer.experts.requires_grad_(False)
    x = torch.randn(5, D, requires_grad=True)
    layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN))[0].sum().backward()
    assert x.grad is not None and x.grad.any()
    assert all(p.grad is None for p in layer.experts.parameters())


def test_deepcopy_computes_the_same() -> None:
    layer = make_layer()
    x = torch.randn(5, D)
    twin = copy.deepcopy(layer)
    assert torch.equal(
        layer(x, tokens=TokenInfo(mode=RouterMode.EVAL))[0],
        twin(x, tokens=TokenInfo(mode=RouterMode.EVAL))[0],
    )


def test_no_tensor_of_tokens_times_experts_times_capacity() -> None:
    num_tokens, num_experts = 512, 8
    capacity = 2 * num_tokens // num_experts
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    layer = MoELayer(
        router=Router(model_dim=D, num_experts=num_experts, config=BranchConfig()),
        experts=Experts(
            num_local_experts=num_experts, first_expert_id=0, model_dim=D, hidden_dim=8, activation=F.relu
        ),
        dispatcher=LocalDispatcher(),
    )
    with Watch():
        y, aux = layer(torch.randn(num_tokens, D), tokens=TokenInfo(mode=RouterMode.TRAIN))
        (y.sum() + aux.balance_loss).backward()
    # two rows per token of the hidden width are the largest thing there is
    assert largest <= 2 * num_tokens * 8 < num_tokens * num_experts * capacity / 50


def test_one_rank_exchanges_nothing() -> None:
    _, aux = make_layer()(torch.randn(5, D), tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert named_stats_of(aux)["all_to_all_cpu_time_ms"] == 0
