"""Routing in one kernel, as on a GPU: the same decision, weights, losses and gradients as the rule step by step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused import launch
from fairseq_moe.fused import top_k as fused_top_k
from fairseq_moe.modules import Experts, LocalDispatcher, MoELayer, Router, RouterMode, TokenInfo, TopKConfig
from fairseq_moe.modules.routing import stats, topk
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.contract import RouterOutput
from fairseq_moe.modules.routing.router import ScorerConfig
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice
from tests.helpers.layer_stats import load_of, stats_of
from tests.helpers.operators import Operators

T, D, E = 20, 8, 6
LOSSES = frozenset({"aux", "seq_aux", "global_aux", "z"})
SIGMOID = ScoreFunction.SIGMOID
RULES: dict[str, dict[str, Any]] = {
    "softmax": {"config": TopKConfig(score=ScoreRule(top_k=2), aux_losses=LOSSES)},
    "no losses": {"config": TopKConfig(score=ScoreRule(top_k=3))},
    "pre": {"config": TopKConfig(score=ScoreRule(top_k=2, pre_softmax=True), aux_losses=LOSSES)},
    "sigmoid": {
        "config": TopKConfig(
            score=ScoreRule(top_k=3, function=SIGMOID, scaling_factor=2.5), aux_losses=LOSSES
        ),
        "balance": BiasConfig(rule=BiasRule.SIGN),
    },
    "probabilities and a bias": {
        "config": TopKConfig(score=ScoreRule(top_k=2, by_probability=True), aux_losses=LOSSES),
        "balance": BiasConfig(rule=BiasRule.SIGN),
    },
    "one of them": {"config": TopKConfig(score=ScoreRule(top_k=1, function=SIGMOID))},
    "quantile": {
        "config": TopKConfig(score=ScoreRule(top_k=2)),
        "balance": BiasConfig(rule=BiasRule.QUANTILE),
    },
}


_NEED_TOP_K = ("sigmoid", "probabilities and a bias", "quantile")


@contextmanager
def kernels(*, on: bool) -> Iterator[None]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "DEVICES", {"cpu", "cuda"} if on else {"cuda"})
        yield


def layer_of(**router: Any) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(
        router=Router(model_dim=D, num_experts=E, **router),
        experts=Experts(
            num_local_experts=E, first_expert_id=0, model_dim=D, hidden_dim=16, activation=F.gelu
        ),
        dispatcher=LocalDispatcher(),
    )
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E))
    return layer


def tokens_of(padded: bool) -> TokenInfo:
    padding_T = torch.arange(T) % 10 >= 8 if padded else None
    return TokenInfo(mode=RouterMode.TRAIN, padding_T=padding_T, num_sequences=2)


def routed_by(router: Router, x_TD: Tensor, tokens: TokenInfo) -> tuple[RouterOutput, list[Tensor]]:
    """Routing of a first and of a recomputed pass, and gradients of all that is differentiable."""
    grads = []
    decision = None
    for _ in range(2):
        leaf_TD = x_TD.clone().requires_grad_()
        router.zero_grad()
        routed = router(leaf_TD, tokens=tokens, decision=decision)
        assert decision is None or routed.decision is decision
        decision = routed.decision
        upper_TK = torch.arange(1.0, routed.weights_TK.numel() + 1).view_as(routed.weights_TK) % 7
        loss = (routed.weights_TK * upper_TK).sum() + sum(routed.losses.values())
        loss.backward()
        assert leaf_TD.grad is not None and router.weight.grad is not None
        grads += [leaf_TD.grad, router.weight.grad.clone()]
    return routed, grads


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_same_routing(name: str, padded: bool) -> None:
    x_TD, tokens = torch.randn(T, D, generator=torch.Generator().manual_seed(1)), tokens_of(padded)
    found, expected = [], []
    for on, results in ((True, found), (False, expected)):
        with kernels(on=on):
            router = layer_of(**RULES[name]).router
            routed, grads = routed_by(router, x_TD, tokens)
        decision = routed.decision
        entropy_T = routed.entropy_T
        assert (entropy_T is not None) is on
        if entropy_T is None:
            entropy_T = stats.gate_entropy(routed.gates_TE.detach(), left_out_T=decision.left_out_T)
        results += [decision.expert_ids_TK, decision.requested_TK, decision.kept_TK, *decision.counts]
        results += [torch.tensor([decision.capacity is None, decision.num_slots is None])]
        results += [] if decision.balance_counts_2E is None else [decision.balance_counts_2E]
        results += [torch.tensor(decision.left_out_T is tokens.padding_T)]
        results += [routed.weights_TK, routed.gates_TE, entropy_T, *grads]
        results += [routed.losses[key] for key in sorted(routed.losses)]
        results += [router.local_counts_E, router.global_counts_E, router.thresholds]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert one.is_floating_point() or torch.equal(one, other)


@pytest.mark.parametrize("name", RULES)
def test_a_whole_layer(name: str) -> None:
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(2))
    results = []
    for on in (True, False):
        with kernels(on=on), Operators() as operators:
            layer, leaf_TD = layer_of(**RULES[name]), x_TD.clone().requires_grad_()
            layer.recompute = True
            y_TD, aux = layer(leaf_TD, tokens=tokens_of(padded=True))
            (y_TD.square().sum() + aux.losses.sum()).backward()
        # Losses of sigmoids, with a bias, go by choices of their own; a quantile needs the best but K.
        assert (operators.names["topk"] > 0) is (not on or name in _NEED_TOP_K)
        grads = [parameter.grad for parameter in layer.parameters()]
        results.append([y_TD, leaf_TD.grad, *grads, aux.losses, load_of(aux), stats_of(aux)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_weighed_in_float32(dtype: torch.dtype) -> None:
    rule = topk.TopKRule(RULES["softmax"]["config"])
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(3)).to(dtype)
    routed = []
    for on in (True, False):
        with kernels(on=on):
            routed.append(rule.route(logits_TE, tokens_of(padded=True)))
    assert torch.equal(routed[0].decision.expert_ids_TK, routed[1].decision.expert_ids_TK)
    assert routed[0].weights_TK.dtype is routed[1].weights_TK.dtype is dtype
    assert routed[0].gates_TE.dtype is routed[1].gates_TE.dtype is torch.float32
    torch.testing.assert_close(routed[0].weights_TK, routed[1].weights_TK)
    torch.testing.assert_close(routed[0].gates_TE, routed[1].gates_TE)


def test_far_fewer_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(**RULES["no losses"])
    with kernels(on=False), Operators() as steps:
        layer._aux(layer.router(torch.randn(T, D), tokens=tokens_of(padded=False)))

    class Launched:
        """Stands in for the kernel, whose interpreter calls operators of its own."""

        times = 0

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            self.times += 1
            return lambda *args, **constants: None

    kernel = Launched()
    monkeypatch.setattr(fused_top_k, "choose_experts", kernel)
    with kernels(on=True), Operators() as operators:
        layer._aux(layer.router(torch.randn(T, D), tokens=tokens_of(padded=False)))
    assert kernel.times == 1
    # Logits, an empty histogram, who is kept, two sums of counts, and five for what the layer hands out.
    assert operators.launches + kernel.times <= 12 < 30 < steps.launches


OTHERS: dict[str, TopKConfig] = {
    **{choice: TopKConfig(score=ScoreRule(top_k=2), choice=choice) for choice in Choice if choice != "token"},
    "groups": TopKConfig(score=ScoreRule(top_k=2, num_groups=3, group_topk=2)),
    "capacity": TopKConfig(score=ScoreRule(top_k=2), capacity=CapacityConfig(factor=1.0)),
    "sqrtsoftplus": TopKConfig(score=ScoreRule(top_k=2, function=ScoreFunction.SQRT_SOFTPLUS)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_rules_are_routed_step_by_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("routed in one kernel")

    monkeypatch.setattr(topk, "route_in_one_kernel", refuse)
    tokens = TokenInfo(mode=RouterMode.TRAIN, ids_T=torch.arange(T))
    with kernels(on=True):
        router = layer_of(config=OTHERS[name]).router
        decision = router(torch.randn(T, D), tokens=tokens).decision
        router(torch.randn(T, D), tokens=tokens, decision=decision)
        with pytest.raises(AssertionError, match="in one kernel"):
            layer_of(**RULES["softmax"]).router(torch.randn(T, D), tokens=tokens)
        # float64 stays float64
        wide = layer_of(**RULES["softmax"], scorer=ScorerConfig(dtype=torch.float64)).router
        assert wide(torch.randn(T, D), tokens=tokens).gates_TE.dtype is torch.float64


def test_a_decision_with_drops_is_obeyed_after_the_warmup_that_dropped() -> None:
    config = TopKConfig(score=ScoreRule(top_k=2), capacity=CapacityConfig(factor=0.5, num_warmup_updates=1))
    with kernels(on=True):
        router, x_TD, tokens = layer_of(config=config).router, torch.randn(T, D), tokens_of(padded=False)
        first = router(x_TD, tokens=tokens)
        assert not first.decision.kept_TK.all()
        router.set_num_updates(1)
        again = router(x_TD, tokens=tokens, decision=first.decision)
        assert torch.equal(first.weights_TK, again.weights_TK)
        assert router(x_TD, tokens=tokens).decision.kept_TK.all()
