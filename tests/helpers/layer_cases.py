"""Build one MoE layer for each way to route, and compare what it computes on one device with another's."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules import (
    AllToAllDispatcher,
    BranchConfig,
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    ScorerConfig,
    SharedExperts,
    TokenInfo,
    TopKConfig,
)
from fairseq_moe.modules.dispatch.allgather import AllGatherDispatcher
from fairseq_moe.modules.dispatch.exchange import LocalExchange
from fairseq_moe.modules.dispatch.padded import plan_padded
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.branch import SecondExpertPolicy
from fairseq_moe.modules.routing.capacity import DropPolicy
from fairseq_moe.modules.routing.contract import RoutingDecision
from fairseq_moe.modules.routing.scores import GroupScore, ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice

__all__ = [
    "DRAWN",
    "LAYER_CASES",
    "MODES",
    "RECOMPUTED",
    "TOKENS",
    "assert_same_layer",
    "layer_of",
    "layer_results",
]

TOKENS, WIDTH, HIDDEN, EXPERTS = 96, 64, 48, 8
_LOSSES = frozenset({"aux", "seq_aux", "global_aux", "z"})
_PLAIN = ScoreRule(top_k=2)
_SIGMOID = ScoreRule(top_k=2, function=ScoreFunction.SIGMOID, scaling_factor=2.5)


def _topk(score: ScoreRule = _PLAIN, **options: Any) -> TopKConfig:
    return TopKConfig(score=score, aux_losses=_LOSSES, **options)


def _capped(policy: DropPolicy) -> TopKConfig:
    return _topk(capacity=CapacityConfig(factor=0.8, policy=policy))


def _groups(group_score: GroupScore) -> TopKConfig:
    return _topk(ScoreRule(top_k=4, num_groups=4, group_topk=2, group_score=group_score))


def _branch(policy: SecondExpertPolicy = SecondExpertPolicy.ALL, **options: Any) -> BranchConfig:
    return BranchConfig(second_expert_policy=policy, **options)


# Options of ``layer_of`` by name.
LAYER_CASES: dict[str, dict[str, Any]] = {
    "branch, two experts": {"config": _branch()},
    "branch, one expert": {"config": BranchConfig(top_k=1)},
    "branch, second one sampled": {"config": _branch(SecondExpertPolicy.SAMPLING)},
    "branch, second one at random": {"config": _branch(SecondExpertPolicy.RANDOM)},
    "branch, normalised before": {"config": _branch(normalize_before_dropping=True, gating_use_fp32=True)},
    "branch, best tokens first": {"config": _branch(batch_prioritized=True)},
    "branch, evaluation": {"config": _branch(eval_capacity_token_fraction=0.2)},
    "branch, generation": {"config": _branch()},
    "softmax": {"config": _topk()},
    "softmax, one expert": {"config": _topk(ScoreRule(top_k=1, pre_softmax=True))},
    "softmax before the choice": {"config": _topk(ScoreRule(top_k=4, pre_softmax=True))},
    "router in float32": {"config": _topk(), "scorer": ScorerConfig(dtype=torch.float32)},
    "sigmoid": {"config": _topk(_SIGMOID)},
    "sigmoid with bias": {"config": _topk(_SIGMOID), "balance": BiasConfig(rule=BiasRule.SIGN)},
    "quantile bias": {"config": _topk(_SIGMOID), "balance": BiasConfig(rule=BiasRule.QUANTILE)},
    "root of softplus": {"config": _topk(ScoreRule(top_k=3, function=ScoreFunction.SQRT_SOFTPLUS))},
    "groups by maximum": {"config": _groups(GroupScore.MAXIMUM)},
    "groups by best two": {"config": _groups(GroupScore.BEST_TWO)},
    "groups by sum": {"config": _groups(GroupScore.SUM_OF_BEST)},
    "capacity by probability": {"config": _capped(DropPolicy.PROBS)},
    "capacity by position": {"config": _capped(DropPolicy.POSITION)},
    "capacity, first choices first": {"config": _capped(DropPolicy.PRIORITIZED)},
    "padded": {
        "config": _topk(capacity=CapacityConfig(factor=1.0, max_tokens=TOKENS)),
        "dispatcher": lambda: LocalDispatcher(plan=plan_padded),
    },
    "expert choice": {"config": _topk(choice=Choice.EXPERT)},
    "expert choice, few slots": {"config": _topk(choice=Choice.EXPERT, capacity=CapacityConfig(factor=0.4))},
    "sinkhorn": {"config": _topk(choice=Choice.SINKHORN)},
    "sinkhorn, one expert": {"config": _topk(ScoreRule(top_k=1), choice=Choice.SINKHORN)},
    "hash": {"config": _topk(choice=Choice.HASH)},
    "round robin": {"config": _topk(choice=Choice.ROUND_ROBIN)},
    "cosine scorer": {"config": _topk(), "scorer": ScorerConfig(cosine=True)},
    "relu experts": {"config": _topk(), "activation": F.relu},
    "experts without a kernel": {"config": _topk(), "activation": torch.tanh},
    "swiglu experts and shared ones": {"config": _topk(), "activation": swiglu, "shared": {}},
    "shared experts with a gate": {"config": _topk(), "shared": {"gated": True, "recompute": True}},
    "all-to-all": {"config": _topk(), "dispatcher": lambda: AllToAllDispatcher(LocalExchange())},
    "all-gather": {
        "config": _topk(),
        "dispatcher": lambda: AllGatherDispatcher(LocalExchange(), first_expert_id=0),
    },
    "experts recomputed": {"config": _topk(), "activation": swiglu, "recompute_experts": True},
    "recomputed": {"config": _topk(), "recompute": True},
}
# What the tokens are for, where it is not training.
MODES = {"branch, evaluation": RouterMode.EVAL, "branch, generation": RouterMode.GENERATE}
# Choices that random numbers decide, which differ between devices: one device obeys the decision of the other.
DRAWN = {"branch, second one sampled", "branch, second one at random"}
# Layers that take no decision from outside, because they recompute themselves.
RECOMPUTED = {"recomputed"}


def layer_of(
    *,
    config: BranchConfig | TopKConfig,
    activation: Callable[[Tensor], Tensor] = F.gelu,
    dispatcher: Callable[[], Any] = LocalDispatcher,
    shared: dict[str, Any] | None = None,
    recompute: bool = False,
    recompute_experts: bool = False,
    **router: Any,
) -> MoELayer:
    """Build a layer on CPU in float32, the same every time."""
    torch.manual_seed(0)
    layer = MoELayer(
        router=Router(model_dim=WIDTH, num_experts=EXPERTS, config=config, **router),
        experts=Experts(
            num_local_experts=EXPERTS,
            first_expert_id=0,
            model_dim=WIDTH,
            hidden_dim=HIDDEN,
            activation=activation,
            recompute=recompute_experts,
        ),
        dispatcher=dispatcher(),
        shared_experts=None
        if shared is None
        else SharedExperts(model_dim=WIDTH, hidden_dim=HIDDEN, activation=activation, **shared),
        recompute=recompute,
    )
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.normal_(std=0.05)
    return layer


def layer_results(
    layer: MoELayer,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rounded: torch.dtype = torch.float32,
    mode: RouterMode = RouterMode.TRAIN,
    decision: RoutingDecision | None = None,
) -> tuple[dict[str, Tensor], RoutingDecision]:
    """Run a copy of the layer forward and backward on random tokens, some of them padding.

    Args:
        layer: on CPU, in float32; it stays as it is.
        dtype: of tokens and parameters.
        device: where.
        rounded: precision that tokens and parameters are rounded to before: then a layer of that precision computes
            with the same values as one in float32, and no hidden value is on the other side of an activation's corner.
        mode: what the tokens are for.
        decision: obeyed instead of taking one, because half precision may decide a near tie otherwise.

    Returns:
        output, losses, loads and every gradient by name, on CPU in float64; and the decision.
    """
    layer = copy.deepcopy(layer).to(rounded).to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(TOKENS, WIDTH, generator=generator).to(rounded).to(device, dtype).requires_grad_()
    cotangent = torch.randn(TOKENS, WIDTH, generator=generator).to(rounded).to(device, dtype)
    padding_T = (torch.arange(TOKENS) % 24 >= 22).to(device)
    ids_T = torch.randint(1000, (TOKENS,), generator=generator).to(device)
    tokens = TokenInfo(mode=mode, padding_T=padding_T, ids_T=ids_T, num_sequences=4)
    memo = None
    if decision is not None:
        memo = RoutingMemo()
        memo.decision = _moved(decision, device)
    routed: list[RoutingDecision] = []
    layer.router.register_forward_hook(lambda _module, _given, output: routed.append(output.decision))
    y_TD, aux = layer(x_TD, tokens=tokens, memo=memo)
    ((y_TD * cotangent).sum() + aux.losses.sum()).backward()
    counts = routed[0].counts
    found = {"output": y_TD, "losses": aux.losses, "grad of tokens": x_TD.grad}
    found["load"] = torch.stack([counts.requested_E, counts.kept_E])
    found |= {f"grad of {name}": p.grad for name, p in layer.named_parameters()}
    assert all(value is not None for value in found.values()), [n for n, v in found.items() if v is None]
    return {name: value.detach().double().cpu() for name, value in found.items()}, routed[0]


def _moved(value: Any, device: torch.device) -> Any:
    """Copy a decision, all tensors in it, to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(*(_moved(part, device) for part in value))
    if isinstance(value, RoutingDecision):
        moved = copy.copy(value)
        for name, part in vars(value).items():
            object.__setattr__(moved, name, _moved(part, device))
        return moved
    return value


def assert_same_layer(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Compare results of ``layer_results``: each off by at most ``tolerance`` of its own norm; loads are equal."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "load":
            assert torch.equal(found[name], value)
            continue
        off = (found[name] - value).norm()
        assert off <= tolerance * value.norm() + 1e-6, (
            f"{name} is off by {off / value.norm():.2e} of its norm"
        )
