"""The router module: scorers, jitter, precision, the expert bias and its counts, the losses' convention."""

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
    ScorerConfig,
    TokenInfo,
    TopKConfig,
)
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule, quantile_thresholds, sign_step
from fairseq_moe.modules.routing.scores import ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig
from tests.helpers.routers import EVAL, SIGMOID, TRAIN, D, E, balanced_logits, make_router, router_of, tokens

# --- scorers ---


def test_jitter_multiplies_the_input_in_training_only() -> None:
    router = make_router(jitter_eps=0.1)
    torch.manual_seed(5)
    found = router(tokens(), tokens=TRAIN)
    torch.manual_seed(5)
    noise = torch.empty(10, D).uniform_(0.9, 1.1)
    torch.testing.assert_close(found.gates_TE, make_router()(tokens() * noise, tokens=TRAIN).gates_TE)
    for mode in (RouterMode.EVAL, RouterMode.GENERATE):
        state = torch.get_rng_state()
        clean = router(tokens(), tokens=TokenInfo(mode=mode))
        assert torch.equal(clean.gates_TE, make_router()(tokens(), tokens=TokenInfo(mode=mode)).gates_TE)
        assert torch.equal(torch.get_rng_state(), state)


def test_jitter_leaves_the_experts_input_alone() -> None:
    experts = Experts(num_local_experts=E, first_expert_id=0, model_dim=D, hidden_dim=8, activation=F.relu)
    seen = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer = MoELayer(
        router=make_router(jitter_eps=0.5),
        experts=experts,
        dispatcher=LocalDispatcher(),
    )
    layer(tokens(), tokens=TRAIN)
    rows = {tuple(row) for row in seen[0].tolist()}
    assert rows == {tuple(row) for row in tokens().tolist()}


@pytest.mark.parametrize("config", [None, BranchConfig()], ids=["megatron", "branch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_the_product(config: BranchConfig | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rule = config or TopKConfig(score=ScoreRule(top_k=2))
    router = Router(model_dim=D, num_experts=E, config=rule, scorer=ScorerConfig(dtype=dtype)).bfloat16()
    x = tokens().bfloat16()
    gates = router(x, tokens=EVAL).gates_TE
    assert gates.dtype == dtype
    torch.testing.assert_close(gates, (x.to(dtype) @ router.weight.to(dtype).t()).softmax(-1))
    assert router.weight.dtype == torch.bfloat16


def test_without_precision_the_product_has_that_of_the_tokens() -> None:
    router = make_router(score=ScoreRule(top_k=2)).bfloat16()
    found = router(tokens().bfloat16(), tokens=TRAIN)
    assert found.weights_TK.dtype == torch.bfloat16
    logits = F.linear(tokens().bfloat16(), router.weight)
    torch.testing.assert_close(found.gates_TE, logits.float().softmax(-1))


def test_autocast_leaves_a_precision_alone_that_was_asked_for() -> None:
    router = make_router(score=ScoreRule(top_k=2), dtype=torch.float32)
    expected = router(tokens(), tokens=EVAL).gates_TE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(tokens(), tokens=EVAL).gates_TE, expected)
        rounded = make_router(score=ScoreRule(top_k=2))(tokens(), tokens=EVAL).gates_TE
    assert not torch.equal(rounded, expected)


def test_cosine_scorer_without_tokens() -> None:
    found = make_router(cosine=True, num_experts=16)(tokens(0), tokens=TRAIN)
    assert found.gates_TE.shape == (0, 16)


@pytest.mark.parametrize("num_experts", [4, 16, 40])
def test_cosine_scorer(num_experts: int) -> None:
    router = make_router(score=ScoreRule(top_k=2), cosine=True, num_experts=num_experts)
    assert router.projection.shape == (16, D) and router.weight.shape == (num_experts, 16)
    torch.testing.assert_close(router.weight.norm(dim=-1), torch.full((num_experts,), 1.5))
    if num_experts <= 16:
        torch.testing.assert_close(router.weight @ router.weight.t(), 2.25 * torch.eye(num_experts))
    projected = tokens() @ router.projection.t()
    logits = torch.stack([projected @ (row / row.norm()) for row in router.weight], dim=-1)
    torch.testing.assert_close(router(tokens(), tokens=TRAIN).gates_TE, logits.softmax(-1))
    before = router(tokens(), tokens=TRAIN).gates_TE.detach()
    with torch.no_grad():
        router.weight *= 7.0
    torch.testing.assert_close(router(tokens(), tokens=TRAIN).gates_TE, before)  # only directions count


def test_cosine_scorer_replaces_what_is_not_finite_by_the_smallest_score() -> None:
    router = make_router(score=ScoreRule(top_k=2), cosine=True)
    x = tokens()
    x[3, 0] = float("inf")
    assert router(x, tokens=EVAL).gates_TE.isfinite().all()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "score", [SIGMOID, ScoreRule(top_k=2), ScoreRule(top_k=1, pre_softmax=True)], ids=str
)
def test_gradients_reach_the_router(cosine: bool, score: ScoreRule) -> None:
    router = make_router(score=score, cosine=cosine)
    weights = router(tokens(), tokens=TRAIN).weights_TK
    (weights * torch.randn_like(weights)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# --- expert bias by signs ---


def update(router: Router, x: Tensor, info: TokenInfo = TRAIN) -> list[int]:
    router.begin_update()
    chosen = router(x, tokens=info).decision.expert_ids_TK
    router.update_bias()
    return torch.bincount(chosen.reshape(-1), minlength=E).tolist()


def test_sign_updates_balance_the_load() -> None:
    router, x = router_of(balanced_logits())
    counts = [update(router, x) for _ in range(12)]
    assert counts[10] != [4, 4, 4, 4] and counts[11] == [4, 4, 4, 4]  # after 11 updates
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.11, 0.0, 0.0, 0.11]))


def test_sign_step() -> None:
    found = torch.tensor([0.0, 0.0, 0.1, 0.0]) + sign_step(torch.tensor([8, 4, 2, 2]), rate=1e-3)
    torch.testing.assert_close(found, torch.tensor([-0.001, 0.0, 0.101, 0.001]))


def test_choices_are_counted_before_the_drop() -> None:
    router, x = router_of(balanced_logits(), capacity=CapacityConfig(factor=0.25))
    router(x, tokens=TRAIN)
    assert router.local_counts_E.tolist() == [6, 4, 4, 2]


def test_all_micro_batches_of_an_update_count_and_padding_does_not() -> None:
    router, x = router_of(balanced_logits())
    router.begin_update()
    router(x[:4], tokens=TRAIN)
    padding = torch.tensor([False, False, False, False, True, True])
    router(torch.cat([x[4:], x[:2]]), tokens=TokenInfo(mode=RouterMode.TRAIN, padding_T=padding))
    assert router.local_counts_E.tolist() == [6, 4, 4, 2]
    router.update_bias()
    router.begin_update()
    assert router.local_counts_E.tolist() == [0, 0, 0, 0]


def test_counts_of_all_ranks_decide() -> None:
    router, x = router_of(balanced_logits())
    router.sum_over_ranks = lambda counts: counts + torch.tensor([0, 100, 0, 0])
    update(router, x)
    torch.testing.assert_close(router.expert_bias, torch.tensor([0.01, -0.01, 0.01, 0.01]))


def test_evaluation_leaves_counts_and_bias_alone() -> None:
    router, x = router_of(balanced_logits())
    update(router, x)
    before = copy.deepcopy(router.state_dict())
    router.begin_update()
    for mode in (RouterMode.EVAL, RouterMode.GENERATE):
        router(x, tokens=TokenInfo(mode=mode))
    assert not router.local_counts_E.any()
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


def test_a_recomputed_pass_is_not_counted_again() -> None:
    router, x = router_of(balanced_logits(), losses={"global_aux"})
    layer = MoELayer(
        router=router,
        experts=Experts(num_local_experts=E, first_expert_id=0, model_dim=8, hidden_dim=8, activation=F.relu),
        dispatcher=LocalDispatcher(),
    )
    memo = RoutingMemo()
    first, first_aux = layer(x, tokens=TRAIN, memo=memo)
    second, second_aux = layer(x, tokens=TRAIN, memo=memo)
    assert router.local_counts_E.tolist() == router.global_counts_E.tolist() == [6, 4, 4, 2]
    assert torch.equal(first, second) and torch.equal(first_aux.losses, second_aux.losses)


def test_bias_is_saved_and_counts_are_not() -> None:
    router, x = router_of(balanced_logits())
    update(router, x)
    assert router.state_dict().keys() == {"weight", "expert_bias"}
    other, _ = router_of(balanced_logits())
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.expert_bias, router.expert_bias)
    assert make_router().state_dict().keys() == {"weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bias_stays_float32_in_a_model_of_another_precision(dtype: torch.dtype) -> None:
    router, x = router_of(balanced_logits())
    update(router, x)
    assert router.to(dtype).expert_bias.dtype == torch.float32
    router.expert_bias = router.expert_bias.to(dtype)  # as FSDP does before each pass
    router.thresholds = router.thresholds.to(dtype)
    update(router, x.to(dtype))
    assert router.expert_bias.dtype == router.thresholds.dtype == torch.float32
    assert torch.equal(router.expert_bias, torch.tensor([-0.02, 0.0, 0.0, 0.02]))


# --- expert bias by quantiles ---

PLAIN = ScoreRule(top_k=2)


def test_quantile_update_balances_at_once() -> None:
    router = make_router(score=PLAIN, bias=BiasConfig(rule=BiasRule.QUANTILE))
    router.weight = torch.nn.Parameter(balanced_logits().t().contiguous())
    assert update(router, torch.eye(8)) == [6, 4, 4, 2]
    torch.testing.assert_close(router.expert_bias, -torch.tensor([0.84375, 0.0, 0.0, -0.84375]))
    assert update(router, torch.eye(8)) == [4, 4, 4, 4]


def test_quantiles_are_averaged_over_micro_batches_that_have_tokens() -> None:
    router = make_router(score=PLAIN, bias=BiasConfig(rule=BiasRule.QUANTILE))
    parts = [tokens(8, seed) for seed in (2, 3)]
    router.begin_update()
    for x in parts:
        router(x, tokens=TRAIN)
    router(parts[0], tokens=TokenInfo(mode=RouterMode.TRAIN, padding_T=torch.ones(8, dtype=torch.bool)))
    router.update_bias()
    zeros = torch.zeros(E)
    mean = sum(quantile_thresholds(x @ router.weight.t(), zeros, top_k=2) for x in parts) / 2
    torch.testing.assert_close(router.expert_bias, (mean.mean() - mean).detach())
    bias = router.expert_bias.clone()
    router.begin_update()
    router.update_bias()  # nothing was seen, nothing changes
    assert torch.equal(router.expert_bias, bias)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9])
def test_quantiles_with_padding_and_any_number_of_tokens(num_tokens: int) -> None:
    values = tokens(num_tokens)[:, :E]
    found = quantile_thresholds(values, torch.zeros(E), top_k=2)
    next_best = values.sort(descending=True).values[:, 2]
    margins = [(values[:, expert] - next_best).sort(descending=True).values for expert in range(E)]
    share = num_tokens * 2 // E
    expected = torch.stack([margin[share] for margin in margins]) if share < num_tokens else torch.zeros(E)
    torch.testing.assert_close(found, expected)
    padded = torch.cat([values, torch.full((3, E), 9.0)])
    padding = torch.tensor([False] * num_tokens + [True] * 3)
    assert torch.equal(quantile_thresholds(padded, torch.zeros(E), top_k=2, padding_T=padding), found)
    assert not quantile_thresholds(values, torch.zeros(E), top_k=E).any()
