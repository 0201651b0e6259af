"""Experts that take rows from tokens and add weighted results to them: every kernel against a plain loop."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules import Experts, LocalDispatcher, MoELayer, Router, RouterMode, TokenInfo, TopKConfig
from fairseq_moe.modules.dispatch.rows import (
    ExpertWork,
    RowPlan,
    plan_order,
    plan_rows,
    take_weights,
)
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu, is_gated, swiglu
from fairseq_moe.modules.kernels.table import Kernel, Stacks, run_experts
from fairseq_moe.modules.routing.contract import RoutingDecision
from fairseq_moe.modules.routing.scores import ScoreRule

T, D, H, E = 7, 8, 16, 4
# Expert 3 is nobody's choice, token 4 lost one of its two experts and token 5 both.
IDS = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0], [2, 1], [2, 0]])
KEPT = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)
DECISION = RoutingDecision.counted(
    expert_ids_TK=IDS, requested_TK=torch.ones_like(KEPT), kept_TK=KEPT, num_experts=E, capacity=None
)
COUNTS = DECISION.counts.kept_E.tolist()
PLAN = plan_rows(DECISION).first(sum(COUNTS))
ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swiglu": swiglu,
    "swiglu, biased": swiglu,
    "clamped swiglu, biased": ClampedSwiglu(alpha=1.702, limit=0.75),
}
KERNELS = [kernel for kernel in Kernel if kernel is not Kernel.FP8]  # which rounds: test_fp8.py


class Leaves(NamedTuple):
    x: Tensor
    weights_TK: Tensor
    fc1_weight: Tensor
    fc2_weight: Tensor
    fc1_bias: Tensor | None
    fc2_bias: Tensor | None

    @property
    def given(self) -> list[Tensor]:
        return [leaf for leaf in self if leaf is not None]


def leaves_of(activation: str, dtype: torch.dtype) -> Leaves:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int, scale: float = 0.5) -> Tensor:
        return torch.randn(shape, generator=generator).mul(scale).to(dtype).requires_grad_()

    width = 2 * H if is_gated(ACTIVATIONS[activation]) else H
    biases = (None, None) if activation == "swiglu" else (leaf(E, width), leaf(E, D))
    return Leaves(leaf(T, D), leaf(T, 2, scale=1.0), leaf(E, width, D), leaf(E, D, H), *biases)


def network(leaves: Leaves, activation: str, x: Tensor, expert: int) -> Tensor:
    b1, b2 = (None if bias is None else bias[expert] for bias in (leaves.fc1_bias, leaves.fc2_bias))
    hidden = ACTIVATIONS[activation](F.linear(x, leaves.fc1_weight[expert], b1))
    return F.linear(hidden, leaves.fc2_weight[expert], b2)


def plainly(leaves: Leaves, activation: str) -> Tensor:
    """Token by token and choice by choice, in float64."""
    rows = []
    for token in range(T):
        y = torch.zeros(D, dtype=torch.float64)
        for choice in range(2):
            if KEPT[token, choice]:
                expert = int(IDS[token, choice])
                y = y + leaves.weights_TK[token, choice] * network(
                    leaves, activation, leaves.x[token], expert
                )
        rows.append(y)
    return torch.stack(rows)


def by_kernel(kernel: Kernel, leaves: Leaves, activation: str, *, dropout: float = 0.0) -> Tensor:
    stacks = Stacks(leaves.fc1_weight, leaves.fc1_bias, leaves.fc2_weight, leaves.fc2_bias)
    work = ExpertWork(counts_L=COUNTS, plan=PLAN, weights_R=take_weights(leaves.weights_TK, PLAN))
    return run_experts(kernel, leaves.x, stacks, work, activation=ACTIVATIONS[activation], dropout=dropout)


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))


# grouped_mm knows no float64.
PRECISIONS = [
    (kernel, dtype)
    for kernel in KERNELS
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if (kernel, dtype) != (Kernel.GROUPED, torch.float64)
]


@pytest.mark.parametrize(("kernel", "dtype"), PRECISIONS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_every_gradient(kernel: Kernel, activation: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(activation, dtype)
    out = by_kernel(kernel, leaves, activation)
    found = (out.detach(), *gradients(out, leaves.given))
    exact = Leaves(*(None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves))
    slow = plainly(exact, activation)
    expected = (slow.detach(), *gradients(slow, exact.given))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)
    assert not found[0][5].any()  # the token without an expert
    assert not found[2][~KEPT].any() and found[2][KEPT].all()  # weights of what was dropped


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_frozen_tokens_weights_and_parameters(kernel: Kernel, activation: str, frozen: int) -> None:
    leaves = leaves_of(activation, torch.float32)
    everything = gradients(by_kernel(kernel, leaves, activation), leaves.given)
    leaves.given[frozen].requires_grad_(False)
    out = by_kernel(kernel, leaves, activation)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    for index, (leaf, expected) in enumerate(zip(leaves.given, everything, strict=True)):
        if index == frozen:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_in_another_order(kernel: Kernel) -> None:
    """As between ranks: results go back to where rows came from, without weights."""
    leaves = leaves_of("gelu", torch.float32)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    counts = [2, 0, 4, 1]
    stacks = Stacks(leaves.fc1_weight, leaves.fc1_bias, leaves.fc2_weight, leaves.fc2_bias)
    parameters = [leaves.x, *(stack for stack in stacks if stack is not None)]

    def run(x: Tensor, plan: RowPlan | None) -> Tensor:
        return run_experts(kernel, x, stacks, ExpertWork(counts_L=counts, plan=plan), activation=F.gelu)

    found = run(leaves.x, plan_order(order))
    expected = torch.empty(T, D).index_copy(0, order, run(leaves.x[order], None))
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, parameters), gradients(expected, parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kernel", [Kernel.SLICED, Kernel.LOOP, Kernel.BMM])
def test_numerical_derivatives_with_dropout(kernel: Kernel, activation: str) -> None:
    leaves = leaves_of(activation, torch.float64)

    def run(*values: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same mask for each of gradcheck's calls
        biases = values[4:] if len(values) > 4 else (None, None)
        return by_kernel(kernel, Leaves(*values[:4], *biases), activation, dropout=0.4)

    assert torch.autograd.gradcheck(run, leaves.given, fast_mode=True)


def test_dropout_leaves_out_values_of_rows_and_keeps_their_mean() -> None:
    rows = torch.ones(4000, D)
    stacks = Stacks(torch.eye(D).unsqueeze(0), None, torch.eye(D).unsqueeze(0), None)
    work = ExpertWork(counts_L=[4000])
    y = run_experts(Kernel.SLICED, rows, stacks, work, activation=F.relu, dropout=0.25)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)


def test_everything_may_be_dropped() -> None:
    leaves = leaves_of("gelu", torch.float32)
    out = by_kernel(Kernel.SLICED, leaves, "gelu", dropout=1.0)
    assert not out.any() and not any(grad.any() for grad in gradients(out, leaves.given))


def test_weights_need_a_plan() -> None:
    with pytest.raises(ValueError, match="no plan"):
        ExpertWork(counts_L=[1], weights_R=torch.ones(1))


def layer_of(activation: Callable[[Tensor], Tensor]) -> MoELayer:
    return MoELayer(
        router=Router(
            model_dim=64,
            num_experts=E,
            config=TopKConfig(score=ScoreRule(top_k=2), aux_losses=frozenset({"aux"})),
        ),
        experts=Experts(
            num_local_experts=E, first_expert_id=0, model_dim=64, hidden_dim=256, activation=activation
        ),
        dispatcher=LocalDispatcher(),
    )


@pytest.mark.parametrize("activation", [F.gelu, swiglu], ids=["gelu", "swiglu"])
def test_a_layer_on_one_rank_keeps_the_hidden_values_and_nothing_else_of_their_rows(
    activation: Callable[[Tensor], Tensor],
) -> None:
    layer, num_tokens = layer_of(activation), 600
    x = torch.randn(num_tokens, 64, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN))
    hidden = 2 * num_tokens * layer.experts.fc1_weight.shape[1]
    assert hidden in kept.values()
    # Per token what the router keeps: some values per expert. Rows of the model's width would be 128 per token.
    assert sum(kept.values()) - hidden < 64 * num_tokens
