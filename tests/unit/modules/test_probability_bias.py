"""A bias beside softmax scores: experts are compared by probability plus bias, and weights are as without it."""

import math
from typing import Any

import pytest
import torch

from fairseq_moe.modules import Router, RouterMode, TokenInfo
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.scores import GroupScore, ScoreRule
from fairseq_moe.modules.routing.topk import TopKConfig
from tests.helpers import slow_routing as slow
from tests.helpers.topk_rules import E, logits, route

BIAS = [0.3, -0.2, 0.0, 0.4, -0.3, 0.1, 0.2, -0.1]
TRAIN = TokenInfo(mode=RouterMode.TRAIN)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("top_k", [2, 8])
@pytest.mark.parametrize("groups", [None, (4, 2, "best_two"), (8, 8, "max")], ids=str)
def test_probabilities_with_a_bias(pre: bool, top_k: int, groups: tuple[int, int, str] | None) -> None:
    if groups is not None and top_k > groups[1] * E // groups[0]:
        groups = (groups[0], groups[0], groups[2])
    options: dict[str, Any] = {}
    if groups is not None:
        options = {"num_groups": groups[0], "group_topk": groups[1], "group_score": GroupScore(groups[2])}
    found = route(logits(), pre_softmax=pre, by_probability=True, top_k=top_k, bias=BIAS, **options)
    rows = zip(found.decision.expert_ids_TK.tolist(), found.weights_TK.tolist(), strict=True)
    expected = slow.routes(logits(), top_k=top_k, pre=pre, bias=BIAS, by_probability=True, groups=groups)
    for (ids, weights), choices in zip(rows, expected, strict=True):
        assert dict(zip(ids, weights, strict=True)) == pytest.approx(choices, abs=1e-12)


def test_probabilities_with_a_bias_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: a bias of 1/5 on the last puts it before the second, by logits it would not."""
    halves = torch.tensor([[3.0, 2.0, 1.0, 1.0]]) * math.log(2.0)
    bias = [0.0, 0.0, 0.0, 0.2]
    by_logit = route(halves, top_k=2, bias=bias)
    assert by_logit.decision.expert_ids_TK.tolist() == [[0, 1]]
    found = route(halves, top_k=2, bias=bias, by_probability=True)
    assert found.decision.expert_ids_TK.tolist() == [[0, 3]]
    # 1/2 and 1/8, divided by their sum.
    torch.testing.assert_close(found.weights_TK, torch.tensor([[0.8, 0.2]]))
    found = route(halves, top_k=2, bias=bias, by_probability=True, pre_softmax=True)
    torch.testing.assert_close(found.weights_TK, torch.tensor([[0.5, 0.125]]))


def test_the_bias_evens_loads_out() -> None:
    """Every token prefers the first experts; each update of the bias moves the less certain ones."""
    torch.manual_seed(0)
    config = TopKConfig(score=ScoreRule(top_k=2, by_probability=True))
    router = Router(
        model_dim=E, num_experts=E, config=config, balance=BiasConfig(rule=BiasRule.SIGN, update_rate=0.01)
    )
    router.weight = torch.nn.Parameter(torch.eye(E))
    x = (logits() - torch.arange(E) / 2).float()
    loads = []
    for _ in range(100):
        router.begin_update()
        chosen = router(x, tokens=TRAIN).decision.expert_ids_TK
        router.update_bias()
        loads.append(torch.bincount(chosen.reshape(-1), minlength=E))
    assert int(loads[0].max()) >= 12 and int(loads[0].min()) <= 2
    late = torch.stack(loads[-20:]).double().mean(0)  # steps of one size swing around the even load, 6
    assert float(late.max()) <= 8 and float(late.min()) >= 4
