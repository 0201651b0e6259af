"""The top-k family of routing rules against plain Python, and its invariants."""

import shutil
from typing import Any

import pytest
import torch

from fairseq_moe.fused.sinkhorn import sinkhorn_plan
from fairseq_moe.modules import RouterMode, TokenInfo
from fairseq_moe.modules.routing.capacity import DropPolicy
from fairseq_moe.modules.routing.scores import GroupScore, ScoreFunction
from fairseq_moe.modules.routing.topk import Choice
from tests.helpers import slow_routing as slow
from tests.helpers.topk_rules import TRAIN, E, T, assert_same, kept, logits, make_rule, route

# --- token choice ---

BIAS = [0.3, -0.2, 0.0, 0.4, -0.3, 0.1, 0.2, -0.1]


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_token_choice(function: str, pre: bool, top_k: int, bias: list[float] | None, scale: float) -> None:
    found = route(
        logits(),
        function=ScoreFunction(function),
        pre_softmax=pre,
        top_k=top_k,
        bias=bias,
        scaling_factor=scale,
    )
    assert_same(
        kept(found), slow.routes(logits(), top_k=top_k, function=function, pre=pre, bias=bias, scale=scale)
    )
    assert found.decision.kept_TK.all()


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize(
    ("groups", "kept_groups", "top_k", "score"),
    [(4, 2, 4, "sum"), (4, 2, 2, "sum"), (2, 1, 3, "sum"), (4, 2, 3, "best_two"), (2, 1, 2, "best_two"),
     (8, 3, 2, "max"), (4, 4, 2, "max")],
)  # fmt: skip
@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
def test_groups(
    function: str, pre: bool, groups: int, kept_groups: int, top_k: int, score: str, bias: list[float] | None
) -> None:
    options: dict[str, Any] = {
        "num_groups": groups,
        "group_topk": kept_groups,
        "group_score": GroupScore(score),
    }
    found = route(
        logits(), function=ScoreFunction(function), pre_softmax=pre, top_k=top_k, bias=bias, **options
    )
    expected = slow.routes(
        logits(), top_k=top_k, function=function, pre=pre, bias=bias, groups=(groups, kept_groups, score)
    )
    assert_same(kept(found), expected)
    size = E // groups
    assert all(len({expert // size for expert in row}) <= kept_groups for row in kept(found))


@pytest.mark.parametrize("pre", [False, True])
def test_weights_follow_one_order_or_the_other(pre: bool) -> None:
    weights = route(logits(), pre_softmax=pre, top_k=3).weights_TK
    probabilities = logits().softmax(-1).topk(3).values
    renormalised = probabilities / probabilities.sum(-1, keepdim=True)  # the order of Hugging Face's Mixtral
    torch.testing.assert_close(weights, probabilities if pre else renormalised)


def test_bias_moves_choices_and_never_weights() -> None:
    with_bias = kept(route(logits(), function=ScoreFunction.SIGMOID, top_k=1, bias=BIAS))
    scores = torch.sigmoid(logits())
    assert any(max(row) != int(scores[token].argmax()) for token, row in enumerate(with_bias))
    for token, row in enumerate(with_bias):
        for expert, weight in row.items():
            assert weight == pytest.approx(float(scores[token, expert]))


# --- capacity ---


@pytest.mark.parametrize("policy", list(DropPolicy))
@pytest.mark.parametrize(
    ("factor", "minimum", "capacity"), [(1.0, 0, 6), (0.5, 0, 3), (1.1, 0, 7), (0.1, 2, 2), (9.0, 0, 54)]
)
@pytest.mark.parametrize("top_k", [2, 3])
def test_capacity(policy: DropPolicy, factor: float, minimum: int, capacity: int, top_k: int) -> None:
    values = logits() + torch.arange(E)  # the last experts are popular
    found = route(values, factor=factor, minimum=minimum, policy=policy, top_k=top_k)
    assert found.decision.capacity is not None
    if top_k == 2:
        assert found.decision.capacity == capacity
    expected = slow.keep(
        slow.routes(values, top_k=top_k), capacity=found.decision.capacity, policy=policy.value
    )
    assert_same(kept(found), expected)
    assert found.decision.requested_TK.all()
    assert (found.weights_TK[~found.decision.kept_TK] == 0).all()


def test_position_keeps_the_first_of_the_batch_whichever_choice_the_expert_is() -> None:
    values = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [3.0, 1.0, 0.0]])
    found = kept(route(values, factor=0.75, policy=DropPolicy.POSITION))  # C = 2
    assert [sorted(row) for row in found] == [[0, 1], [0, 1], [2], []]


@pytest.mark.parametrize("policy", list(DropPolicy))
def test_equal_weights_fall_to_earlier_tokens(policy: DropPolicy) -> None:
    values = torch.zeros(8, 4)
    values[:, :2] = 1.0
    found = kept(route(values, factor=1.0, policy=policy))  # C = 4
    assert [len(row) for row in found] == [2, 2, 2, 2, 0, 0, 0, 0]


def test_schedule_ends_the_limit() -> None:
    rule = make_rule(factor=0.5, num_warmup_updates=200)
    dropped = []
    for num_updates in (0, 199, 200, 1000):
        rule.set_num_updates(num_updates)
        decision = rule.route(logits(), TokenInfo(mode=TRAIN), None).decision
        dropped.append(bool((~decision.kept_TK).any()))
    assert dropped == [True, True, False, False]


def test_evaluation_has_the_limit_and_generation_has_none() -> None:
    found = {mode: route(logits(), mode, factor=0.5).decision.capacity for mode in RouterMode}
    assert found == {RouterMode.TRAIN: 3, RouterMode.EVAL: 3, RouterMode.GENERATE: None}


def test_places_of_padded_experts_do_not_depend_on_the_batch() -> None:
    places = [
        route(logits(num_tokens=tokens), factor=1.0, max_tokens=T).decision.num_slots for tokens in (5, 17, T)
    ]
    assert places == [6, 6, 6]
    with pytest.raises(
        ValueError, match="a training batch has 25 tokens, but experts are padded for at most 24"
    ):
        route(logits(num_tokens=T + 1), factor=1.0, max_tokens=T)
    assert (
        route(logits(num_tokens=T + 1), RouterMode.EVAL, factor=1.0, max_tokens=T).decision.num_slots is None
    )


# --- expert choice ---


@pytest.mark.parametrize(("factor", "places"), [(None, 6), (1.0, 6), (1.25, 8), (0.5, 3), (100.0, T)])
@pytest.mark.parametrize("function", list(ScoreFunction))
def test_expert_choice(factor: float | None, places: int, function: ScoreFunction) -> None:
    found = route(logits(), choice=Choice.EXPERT, factor=factor, function=function, scaling_factor=2.0)
    scores = logits().softmax(-1) if function is ScoreFunction.SOFTMAX else torch.sigmoid(logits())
    if function is ScoreFunction.SQRT_SOFTPLUS:
        scores = (1 + logits().exp()).log().sqrt()
    scores = scores / scores.sum(-1, keepdim=True)
    expected: list[dict[int, float]] = [{} for _ in range(T)]
    for expert in range(E):
        column = scores[:, expert].tolist()
        for token in sorted(range(T), key=lambda token: -column[token])[:places]:
            expected[token][expert] = 2 * column[token]
    assert_same(kept(found), expected)


def test_expert_choice_falls_back_to_tokens_in_generation_with_the_same_kind_of_weight() -> None:
    found = route(logits(), RouterMode.GENERATE, choice=Choice.EXPERT)
    assert_same(kept(found), slow.routes(logits(), top_k=2, pre=True))
    one_by_one = [
        kept(route(logits()[token : token + 1], RouterMode.GENERATE, choice=Choice.EXPERT))[0]
        for token in range(T)
    ]
    assert_same(one_by_one, kept(found))


def test_expert_choice_with_as_many_choices_as_experts() -> None:
    found = route(logits(), choice=Choice.EXPERT, top_k=E)
    ids, weights = found.decision.expert_ids_TK, logits().softmax(-1)
    assert torch.equal(
        ids, logits().argsort(descending=True)
    )  # a token's favourites first, for the statistics
    torch.testing.assert_close(found.weights_TK, weights.gather(-1, ids))


# --- Sinkhorn ---


def test_sinkhorn_plan_without_shift_and_cap() -> None:
    torch.testing.assert_close(
        sinkhorn_plan(logits()), torch.tensor(slow.sinkhorn(logits())).double(), atol=1e-5, rtol=0
    )


def test_sinkhorn_survives_large_logits() -> None:
    plan = sinkhorn_plan(200 * logits())
    assert plan.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_balances_in_training_only(top_k: int) -> None:
    values = logits() + torch.arange(E) / 2
    training = route(values, choice=Choice.SINKHORN, top_k=top_k)
    plan = torch.tensor(slow.sinkhorn(values))
    full = torch.sigmoid(values) if top_k == 1 else values.softmax(-1)
    expected = [
        {expert: float(full[token, expert]) for expert in row.topk(top_k).indices.tolist()}
        for token, row in enumerate(plan)
    ]
    assert_same(kept(training), expected)
    for mode in (RouterMode.EVAL, RouterMode.GENERATE):
        evaluated = route(values, mode, choice=Choice.SINKHORN, top_k=top_k)
        assert torch.equal(evaluated.decision.expert_ids_TK, values.topk(top_k).indices)
        torch.testing.assert_close(evaluated.weights_TK, full.topk(top_k).values)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_sinkhorn_compiles_as_a_whole() -> None:
    compiled = torch.compile(sinkhorn_plan, fullgraph=True)
    values = logits().float()
    torch.testing.assert_close(compiled(values), sinkhorn_plan(values), atol=1e-7, rtol=1e-5)


# --- forced choices ---


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_hash_gives_different_experts_that_follow_from_the_word(top_k: int) -> None:
    ids = torch.arange(10_000)
    values = logits(num_tokens=len(ids))
    chosen = route(values, choice=Choice.HASH, top_k=top_k, info={"ids_T": ids}).decision.expert_ids_TK
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    again = route(-values.flip(0), choice=Choice.HASH, top_k=top_k, info={"ids_T": ids.flip(0)})
    assert torch.equal(again.decision.expert_ids_TK.flip(0), chosen)
    counts = torch.bincount(chosen.reshape(-1), minlength=E) / chosen.numel()
    torch.testing.assert_close(counts, torch.full((E,), 1 / E), atol=0.01, rtol=0)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_round_robin_is_exact(top_k: int) -> None:
    chosen = route(logits(), choice=Choice.ROUND_ROBIN, top_k=top_k).decision.expert_ids_TK
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    assert torch.bincount(chosen.reshape(-1)).tolist() == [T * top_k // E] * E


def test_random_draws_in_training_and_lets_gradients_through() -> None:
    values = logits().requires_grad_()
    torch.manual_seed(3)
    found = route(values, choice=Choice.RANDOM, aux_losses=frozenset({"z"}))
    torch.manual_seed(3)
    noise = torch.randn_like(values)
    assert_same(kept(found), slow.routes(noise, top_k=2))
    upstream = torch.randn_like(found.weights_TK)
    (found.weights_TK * upstream).sum().backward()
    drawn = noise.requires_grad_()
    (route(drawn).weights_TK * upstream).sum().backward()
    torch.testing.assert_close(values.grad, drawn.grad)
    # The z-loss looks at the router's own logits.
    torch.testing.assert_close(found.losses["z"], torch.logsumexp(values, -1).square().mean())
    evaluated = route(values, RouterMode.EVAL, choice=Choice.RANDOM)
    assert torch.equal(evaluated.decision.expert_ids_TK, route(values).decision.expert_ids_TK)


# --- all rules ---

RULES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"function": ScoreFunction.SIGMOID, "bias": BIAS},
    "groups": {"num_groups": 4, "group_topk": 2},
    "expert": {"choice": Choice.EXPERT},
    "sinkhorn": {"choice": Choice.SINKHORN},
    "hash": {"choice": Choice.HASH},
    "round_robin": {"choice": Choice.ROUND_ROBIN},
    **{f"drop {policy.value}": {"factor": 1.0, "policy": policy} for policy in DropPolicy},
}
LOSSES = frozenset({"aux", "seq_aux", "global_aux", "z"})


@pytest.mark.parametrize("name", RULES)
def test_padding_changes_nothing(name: str) -> None:
    values, ids = logits(num_tokens=20), torch.arange(20)
    padding = torch.tensor([False] * 10 + [True, True] + [False] * 10 + [True, True])
    padded = torch.full((T, E), 7.0, dtype=torch.float64).masked_scatter(~padding.unsqueeze(-1), values)
    padded_ids = torch.zeros(T, dtype=torch.int64).masked_scatter(~padding, ids)
    options = RULES[name]
    plain = route(values, info={"ids_T": ids, "num_sequences": 2}, aux_losses=LOSSES, **options)
    found = route(
        padded,
        info={"ids_T": padded_ids, "num_sequences": 2, "padding_T": padding},
        aux_losses=LOSSES,
        **options,
    )
    rows = kept(found)
    assert_same([row for row, is_padding in zip(rows, padding, strict=True) if not is_padding], kept(plain))
    assert not found.decision.requested_TK[padding].any()
    assert not found.weights_TK[padding].any()
    for loss in LOSSES:
        torch.testing.assert_close(found.losses[loss], plain.losses[loss], msg=loss)


@pytest.mark.parametrize("name", RULES)
def test_no_tokens_and_nothing_but_padding(name: str) -> None:
    for num_tokens in (0, 4):
        values = logits(num_tokens=num_tokens).requires_grad_()
        info = {
            "ids_T": torch.zeros(num_tokens, dtype=torch.int64),
            "padding_T": torch.ones(num_tokens, dtype=torch.bool),
        }
        found = route(values, info=info, aux_losses=LOSSES, **RULES[name])
        (found.weights_TK.sum() + sum(found.losses.values())).backward()
        assert kept(found) == [{}] * num_tokens
        assert {float(loss.detach()) for loss in found.losses.values()} == {0.0}
        assert values.grad is not None and not values.grad.any()


@pytest.mark.parametrize("name", RULES)
def test_remembered_decision_is_obeyed(name: str) -> None:
    rule = make_rule(aux_losses=LOSSES, **RULES[name])
    tokens = TokenInfo(mode=TRAIN, ids_T=torch.arange(T))
    first = rule.route(logits(), tokens, None)
    second = rule.route(logits(1), tokens, first.decision)
    assert second.decision is first.decision
    again = rule.route(logits(), tokens, first.decision)
    assert torch.equal(again.weights_TK, first.weights_TK)
    assert {name: float(value) for name, value in again.losses.items()} == {
        name: float(value) for name, value in first.losses.items()
    }
