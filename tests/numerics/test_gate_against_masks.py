"""The index-based gate equals one made of masks in weights, slots, balance loss, statistics and gradients."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.routing import branch, contract, stats
from fairseq_moe.modules.routing.branch import SecondExpertPolicy
from fairseq_moe.modules.routing.contract import TokenInfo
from fairseq_moe.modules.routing.losses import balance_loss
from fairseq_moe.modules.routing.router import BranchConfig, Router, RouterMode, RouterOutput
from tests.numerics.mask_gate import GateCase, MaskGate, mask_gate

POLICIES = ["all", "sampling", "random"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = [
    GateCase(
        policy=policy,
        normalize_before=normalize_before,
        prioritized=prioritized,
        training=training,
        eval_fraction=fraction,
    )
    for policy, normalize_before, prioritized, (training, fraction) in itertools.product(
        POLICIES, [False, True], [False, True], [(True, 0.25), (False, 0.25), (False, 0.1), (False, -1.0)]
    )
] + [
    GateCase(top_k=1, training=training, eval_fraction=fraction)
    for training, fraction in [(True, 0.25), (False, 0.25), (False, 0.0), (False, 1.0)]
]


def run_ours(logits_SE: Tensor, case: GateCase, padding_S: Tensor | None, *, seed: int) -> RouterOutput:
    """Our router on given logits (its weight is the identity), drawing from the generator seeded so."""
    config = BranchConfig(
        top_k=case.top_k,
        gating_use_fp32=case.use_fp32,
        second_expert_policy=SecondExpertPolicy(case.policy),
        normalize_before_dropping=case.normalize_before,
        batch_prioritized=case.prioritized,
        eval_capacity_token_fraction=case.eval_fraction,
    )
    num_experts = logits_SE.shape[1]
    router = Router(model_dim=num_experts, num_experts=num_experts, config=config).to(logits_SE.dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    torch.manual_seed(seed)
    mode = RouterMode.TRAIN if case.training else RouterMode.EVAL
    return router(logits_SE, tokens=TokenInfo(mode=mode, padding_T=padding_S))


def combine_of(routed: RouterOutput, case: GateCase, gates_SE: Tensor, like: MaskGate) -> Tensor:
    """Our weights put at (token, expert, place in the queue)."""
    decision = routed.decision
    places_SK = contract.queue_positions(
        decision.expert_ids_TK,
        decision.requested_TK,
        num_experts=gates_SE.shape[1],
        priority_T=gates_SE.amax(-1) if case.prioritized and case.top_k == 2 else None,
    )
    combine = torch.zeros_like(like.combine_SEC)
    for choice in range(case.top_k):
        (tokens,) = torch.where(decision.kept_TK[:, choice])
        index = (tokens, decision.expert_ids_TK[tokens, choice], places_SK[tokens, choice])
        combine = combine.index_put(index, routed.weights_TK[tokens, choice], accumulate=True)
    return combine


def check(case: GateCase, *, dtype: torch.dtype, num_tokens: int, num_experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits = (2 * torch.randn(num_tokens, num_experts)).to(dtype)
    padding = torch.rand(num_tokens) < 0.3 if seed % 2 else None
    cotangent = torch.randn(num_tokens, num_experts, 1, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    torch.manual_seed(seed)  # the same draws for both
    gate_dtype = torch.float32 if case.use_fp32 and dtype != torch.float64 else dtype
    noise = branch.gumbel_noise(logits.to(gate_dtype))
    torch.manual_seed(seed)
    draw = torch.rand(num_tokens, dtype=gate_dtype)
    routed = run_ours(ours, case, padding, seed=seed)
    masks = mask_gate(theirs, case, padding_S=padding, noise_SE=noise, draw_S=draw)

    combine = combine_of(routed, case, routed.gates_TE.detach(), masks)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(combine, masks.combine_SEC, atol=bound, rtol=0)
    l_aux = balance_loss(routed.gates_TE, routed.decision.counts.first_choices())
    torch.testing.assert_close(l_aux, masks.l_aux, atol=1e-5, rtol=1e-5)
    check_statistics(routed, masks, narrow_gates=gate_dtype in (torch.float16, torch.bfloat16))

    ((combine.double() * cotangent).sum() + l_aux.double()).backward()
    ((masks.combine_SEC.double() * cotangent).sum() + masks.l_aux.double()).backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=4 * bound, rtol=4 * bound)


def check_statistics(routed: RouterOutput, masks: MaskGate, *, narrow_gates: bool) -> None:
    measures = stats.layer_measures(stats.gate_entropy(routed.gates_TE.detach()))
    histogram = routed.decision.counts.histogram_34E
    vector = stats.layer_stats(histogram.unsqueeze(0), measures.unsqueeze(0))[0]
    named = dict(zip(stats.LAYER_STATS, vector.tolist(), strict=True))
    for name, value in named.items():
        bound = 1e-2 if narrow_gates and name == "entropy_gating" else 2e-4
        assert value == pytest.approx(masks.stats.get(name, 0.0), abs=bound), name
    assert routed.decision.counts.requested_E.tolist() == masks.wanted_SE.sum(0).tolist()


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float64(case: GateCase) -> None:
    for seed, (num_tokens, num_experts) in enumerate([(24, 4), (1, 5), (40, 7), (9, 1)]):
        check(case, dtype=torch.float64, num_tokens=num_tokens, num_experts=num_experts, seed=seed)


@pytest.mark.parametrize("use_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_and_random_shapes(dtype: torch.dtype, use_fp32: bool) -> None:
    picker = random.Random(7)
    for seed in range(25):
        case = picker.choice(CASES)
        case = GateCase(**{**case.__dict__, "use_fp32": use_fp32})
        num_experts = picker.choice([2, 3, 4, 7, 16])
        check(case, dtype=dtype, num_tokens=picker.randint(1, 60), num_experts=num_experts, seed=seed)


class TestPublishedValues:
    """The cases of fairscale's own test of its top-2 gate."""

    def test_forward(self) -> None:
        torch.manual_seed(3)
        tokens = torch.randn(12, 4)
        router = Router(
            model_dim=4,
            num_experts=6,
            config=BranchConfig(second_expert_policy=SecondExpertPolicy.SAMPLING),
        )
        routed = router(tokens, tokens=TokenInfo(mode=RouterMode.TRAIN))
        l_aux = balance_loss(routed.gates_TE.detach(), routed.decision.counts.first_choices())
        assert routed.decision.capacity == 4
        assert float(l_aux) == pytest.approx(0.961, rel=1e-2)
        assert float(l_aux) / 36 == pytest.approx(0.0267, rel=1e-2)
        assert (routed.decision.counts.kept_E <= 4).all()
        assert ((routed.weights_TK >= 0) & (routed.weights_TK <= 1)).all()
        assert float(routed.weights_TK.detach().sum()) == pytest.approx(12.0)

    def test_expert1_overflow(self) -> None:
        logits = torch.zeros(8, 4)
        logits[:, 0] = 1.0  # all prefer expert 0, which has 2 * ceil(8 / 4) = 4 places
        decision = run_ours(logits, GateCase(policy="sampling"), None, seed=0).decision
        assert decision.expert_ids_TK[:, 0].tolist() == [0] * 8
        assert decision.kept_TK[:, 0].tolist() == [True] * 4 + [False] * 4
