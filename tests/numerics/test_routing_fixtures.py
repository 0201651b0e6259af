"""Routing, losses and capacity against values that Megatron-Core's own code gave for three sets of logits.

All values are exact in float32 and free of ties. L1 and L2 have 8 tokens and 4 experts, L3 4 tokens and 8 experts:
logit[t, e] = ((7 t + 13 e) mod 17) / 4 - 2, plus a constant per expert in L2 and e / 64 in L3.
"""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused.sinkhorn import sinkhorn_plan
from fairseq_moe.modules.routing import losses
from fairseq_moe.modules.routing.capacity import DropPolicy, expert_capacity, keep_within_capacity
from fairseq_moe.modules.routing.scores import (
    ScoreFunction,
    ScoreRule,
    choice_scores,
    normalized_scores,
    token_choice,
    weights_of_choice,
)

SOFTMAX, SIGMOID, SQRT_SOFTPLUS = ScoreFunction
POST = ScoreRule(top_k=2)
PRE = ScoreRule(top_k=2, pre_softmax=True)
SIG = ScoreRule(top_k=2, function=SIGMOID)
SQRT = ScoreRule(top_k=2, function=SQRT_SOFTPLUS)


def table(num_tokens: int, num_experts: int) -> Tensor:
    tokens, experts = torch.arange(num_tokens).unsqueeze(1), torch.arange(num_experts)
    return ((7 * tokens + 13 * experts) % 17) / 4 - 2.0


L1 = table(8, 4)
L2 = L1 + torch.tensor([1.0625, 0.5, 0.0, -1.03125])
L3 = table(4, 8) + torch.arange(8) / 64


def close(found: Tensor | float, expected: list[float] | float) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.tensor(expected), atol=6e-7, rtol=0)


def route(logits: Tensor, rule: ScoreRule, bias: list[float] | None = None) -> tuple[Tensor, Tensor]:
    bias_E = None if bias is None else torch.tensor(bias)
    ids = token_choice(choice_scores(logits, rule, bias_E=bias_E), rule.top_k)
    return ids, weights_of_choice(logits, ids, rule)


def counts(ids: Tensor, num_experts: int = 4) -> list[int]:
    return torch.bincount(ids.reshape(-1), minlength=num_experts).tolist()


@pytest.mark.parametrize(
    ("logits", "rule", "first", "total"),
    [
        (L1, POST, [0.731059, 0.268941], 8.0),
        (L1, PRE, [0.648513, 0.238575], 7.143526),
        (L1, SIG, [0.580301, 0.419699], 8.0),
        (L1, SQRT, [0.574196, 0.425804], 8.0),
        (L2, POST, [0.817574, 0.182426], 8.0),
        (L2, PRE, [0.757318, 0.168980], 7.204624),
        (L2, SIG, [0.602457, 0.397543], 8.0),
        (L2, SQRT, [0.603298, 0.396702], 8.0),
    ],
)
def test_choices_and_weights(logits: Tensor, rule: ScoreRule, first: list[float], total: float) -> None:
    ids, weights = route(logits, rule)
    assert counts(ids) == ([4, 4, 4, 4] if logits is L1 else [6, 4, 4, 2])
    assert ids[0].tolist() == [1, 2]
    close(weights[0], first)
    torch.testing.assert_close(weights.sum(), torch.tensor(total), atol=3e-6, rtol=0)


def test_bias_moves_choices_and_scaling_multiplies() -> None:
    rule = ScoreRule(top_k=2, function=SIGMOID, scaling_factor=2.5)
    ids, weights = route(L1, rule, bias=[0.5, 0.0, 0.0, -0.5])
    assert counts(ids) == [8, 5, 2, 1]
    by_expert = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert by_expert[0] == pytest.approx(0.332411, abs=1e-6)
    assert by_expert[1] == pytest.approx(2.167589, abs=1e-6)
    assert float(weights.sum()) == pytest.approx(20.0, abs=1e-5)
    assert counts(route(L2, SIG, bias=[-0.4, 0.0, 0.1, 0.4])[0]) == [2, 6, 4, 4]


@pytest.mark.parametrize(
    ("groups", "kept", "top_k", "chosen"),
    [
        (4, 2, 4, ["4567", "2367", "0145", "2367"]),
        (2, 1, 2, ["56", "23", "45", "67"]),
        (4, 2, 2, ["15", "27", "04", "26"]),
    ],
)
def test_group_limited_choice(groups: int, kept: int, top_k: int, chosen: list[str]) -> None:
    rule = ScoreRule(top_k=top_k, num_groups=groups, group_topk=kept)
    ids = route(L3, rule)[0].sort(-1).values
    assert ["".join(map(str, row)) for row in ids.tolist()] == chosen


@pytest.mark.parametrize(
    ("function", "pre_softmax", "scale", "expected"),
    [
        (SOFTMAX, True, 16.0, {0: 0.16633, 1: 4.35719, 4: 0.22734, 5: 5.95557}),
        (SIGMOID, False, 2.5, {4: 0.19198, 5: 1.01944, 6: 0.79227, 7: 0.49631}),
    ],
)
def test_group_limited_weights(
    function: ScoreFunction, pre_softmax: bool, scale: float, expected: dict[int, float]
) -> None:
    rule = ScoreRule(
        top_k=4, function=function, pre_softmax=pre_softmax, scaling_factor=scale, num_groups=4, group_topk=2
    )
    ids, weights = route(L3, rule)
    found = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert found == {expert: pytest.approx(weight, abs=6e-6) for expert, weight in expected.items()}


def aux(logits: Tensor, function: ScoreFunction = SOFTMAX) -> float:
    scores = normalized_scores(logits, function)
    return float(losses.load_balancing_loss(scores, losses.choice_counts(scores, top_k=2)))


def test_aux_loss_of_a_micro_batch() -> None:
    for function in ScoreFunction:
        close(aux(L1, function), 1.0)
    close(aux(L2, SOFTMAX), 1.158797)
    close(aux(L2, SIGMOID), 1.080869)
    close(aux(L2, SQRT_SOFTPLUS), 1.069528)
    close(aux(L2[:4]), 1.298211)
    close(aux(L2[4:]), 1.221002)


@pytest.mark.parametrize(
    ("logits", "seq_len", "num_sequences", "expected"),
    [(L1, 4, 2, 1.0956), (L2, 4, 2, 1.259607), (L2, 2, 4, 1.368666)],
)
def test_aux_loss_of_sequences(logits: Tensor, seq_len: int, num_sequences: int, expected: float) -> None:
    # Megatron's rows are sequence-major (row = s * B + b); ours are batch-major.
    batch_major = logits.view(seq_len, num_sequences, 4).transpose(0, 1).reshape(8, 4)
    scores = normalized_scores(batch_major, SOFTMAX)
    found = losses.sequence_balancing_loss(scores, token_choice(scores, 2), num_sequences=num_sequences)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_global_aux_loss_counts_the_micro_batches_so_far() -> None:
    scores = normalized_scores(L2, SOFTMAX)
    first, second = (losses.choice_counts(part, top_k=2) for part in (scores[:4], scores[4:]))
    close(losses.load_balancing_loss(scores[:4], first), 1.298211)
    close(losses.load_balancing_loss(scores[4:], first + second), 1.186554)


def test_the_parts_of_two_ranks_add_up_to_the_loss_of_their_batch() -> None:
    scores = normalized_scores(L2, SOFTMAX)
    both = losses.choice_counts(scores, top_k=2)
    parts = [
        losses.load_balancing_loss(part, both, num_tokens=torch.tensor(8.0))
        for part in (scores[:4], scores[4:])
    ]
    close(parts[0], 0.565520)
    close(parts[1], 0.593277)
    close(parts[0] + parts[1], aux(L2))


def test_z_loss() -> None:
    padding = torch.arange(8) >= 4
    close(losses.z_loss(L1), 3.983717)
    close(losses.z_loss(L1, padding_T=padding), 3.797256)
    torch.testing.assert_close(losses.z_loss(L2), torch.tensor(5.360725), atol=1e-6, rtol=0)


def test_gradients_of_aux_and_z() -> None:
    logits = L2.clone().requires_grad_()
    counted = losses.choice_counts(logits.detach(), top_k=2)
    losses.load_balancing_loss(normalized_scores(logits, SOFTMAX), counted).backward()
    close(logits.grad[0], [0.003126, -0.001390, -0.000310, -0.001426])
    logits.grad = None
    losses.z_loss(logits).backward()
    close(logits.grad[0], [0.026128, 0.383955, 0.085672, 0.011238])


@pytest.mark.parametrize(
    ("logits", "factor", "kept_counts", "total"),
    [
        (L1, 1.0, [4, 4, 4, 4], 8.0),
        (L1, 0.5, [2, 2, 2, 2], 5.940951),
        (L2, 1.0, [4, 4, 4, 2], 7.532587),
        (L2, 0.5, [2, 2, 2, 2], 5.422651),
        (L2, 1.25, [5, 4, 4, 2], 7.766294),
    ],
)
def test_drop_by_probability(logits: Tensor, factor: float, kept_counts: list[int], total: float) -> None:
    ids, weights = route(logits, POST)
    kept = keep_within_capacity(
        ids,
        weights,
        torch.ones_like(ids, dtype=torch.bool),
        num_experts=4,
        capacity=expert_capacity(8, 4, top_k=2, factor=factor),
        policy=DropPolicy.PROBS,
    )
    assert counts(ids[kept]) == kept_counts
    torch.testing.assert_close((weights * kept).sum(), torch.tensor(total), atol=2e-6, rtol=0)
    if factor == 0.5:
        tokens = [(kept & (ids == expert)).any(-1).nonzero().view(-1).tolist() for expert in range(4)]
        assert tokens == [[2, 7], [0, 5], [1, 3], [4, 6]]


@pytest.mark.parametrize(
    ("pairs", "num_experts", "factor", "minimum", "expected"),
    [(16, 4, 1, 0, 4), (16, 4, 0.5, 0, 2), (14, 4, 1, 0, 4), (14, 4, 1.25, 0, 5), (10, 8, 1, 4, 4)],
)
def test_capacity(pairs: int, num_experts: int, factor: float, minimum: int, expected: int) -> None:
    found = expert_capacity(pairs // 2, num_experts, top_k=2, factor=factor, minimum=minimum)
    assert found == expected


@pytest.mark.parametrize(
    ("logits", "row", "experts"),
    [
        (L1, [0.003425, 0.082985, 0.028680, 0.009912], [4, 4, 4, 4]),
        (L2, [0.003425, 0.082985, 0.028677, 0.009911], [4, 4, 4, 4]),
    ],
)
def test_sinkhorn_plan(logits: Tensor, row: list[float], experts: list[int]) -> None:
    plan = sinkhorn_plan(logits)
    close(plan[0], row)
    assert counts(token_choice(plan, 2)) == experts
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 0.25), atol=1e-4, rtol=0)


def test_sinkhorn_with_one_expert_per_token() -> None:
    ids = token_choice(sinkhorn_plan(L2), 1)
    assert ids.view(-1).tolist() == [1, 2, 0, 2, 3, 1, 3, 0]
    close(
        torch.sigmoid(L2.gather(-1, ids)).view(-1),
        [0.851953, 0.880797, 0.928409, 0.7773, 0.72487, 0.880797, 0.55447, 0.943348],
    )
