"""The network that a GPU runs: nothing waits for the device, little is kept, and what is nobody's reaches nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused import launch
from fairseq_moe.modules import Experts, LocalDispatcher, MoELayer, Router, RouterMode, TokenInfo, TopKConfig
from fairseq_moe.modules.dispatch.rows import ExpertWork, plan_rows, take_weights
from fairseq_moe.modules.kernels import by_matrix, lean
from fairseq_moe.modules.kernels.activation import Activation
from fairseq_moe.modules.kernels.contract import Network, Stacks
from fairseq_moe.modules.kernels.products import BatchedProducts, GroupedProducts, LoopProducts, Products
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.routing.contract import RoutingDecision
from fairseq_moe.modules.routing.scores import ScoreRule

T, D, F_, E = 13, 8, 16, 4
GENERATOR = torch.Generator()
IDS = torch.stack([torch.randperm(E, generator=GENERATOR.manual_seed(seed))[:2] for seed in range(T)])
IDS[IDS == 3] = 0  # nobody's choice
IDS[:, 1] = torch.where(IDS[:, 1] == IDS[:, 0], (IDS[:, 0] + 1) % 3, IDS[:, 1])
KEPT = torch.rand(T, 2, generator=GENERATOR.manual_seed(1)) > 0.3
DECISION = RoutingDecision.counted(
    expert_ids_TK=IDS, requested_TK=torch.ones_like(KEPT), kept_TK=KEPT, num_experts=E, capacity=None
)
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "swiglu": swiglu, "tanh": torch.tanh}


@pytest.fixture(params=["twins", "kernels"])
def _with_and_without_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernels":
        pytest.importorskip("triton")
        monkeypatch.setattr(launch, "DEVICES", {"cpu", "cuda"})


def leaves_of(activation: str, *, biased: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = 2 * F_ if activation == "swiglu" else F_
    shapes = [(T, D), (T, 2), (E, width, D), (E, D, F_), *([(E, width), (E, D)] if biased else [])]
    return [torch.randn(s, generator=generator).mul(0.5).to(dtype).requires_grad_() for s in shapes]


def stacks_of(leaves: list[Tensor]) -> Stacks:
    fc1, fc2, *biases = leaves[2:]
    b1, b2 = biases or (None, None)
    return Stacks(fc1, b1, fc2, b2)


class SpoilsRowsThatAreNobodys:
    """As a GPU's products do: what stands behind the last row is whatever memory held."""

    def __init__(self, products: Products, num_rows: int) -> None:
        self.products, self.num_rows = products, num_rows

    def _spoiled(self, values: Tensor) -> Tensor:
        values[self.num_rows :] = float("nan")
        return values

    def outputs(self, x_RI: Tensor, weight_LOI: Tensor) -> Tensor:
        return self._spoiled(self.products.outputs(x_RI, weight_LOI))

    def grad_rows(self, grad_RO: Tensor, weight_LOI: Tensor) -> Tensor:
        return self._spoiled(self.products.grad_rows(grad_RO, weight_LOI))

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        return self.products.grad_weight(grad_RO, x_RI)


def lean_result(leaves: list[Tensor], activation: str) -> Tensor:
    """With counts on the device alone, and more rows than they count."""
    plan, counts_L = plan_rows(DECISION), DECISION.counts.kept_E
    work = ExpertWork(counts_L=counts_L, plan=plan, weights_R=take_weights(leaves[1], plan))
    products = SpoilsRowsThatAreNobodys(GroupedProducts(counts_L.cumsum(0).int()), int(counts_L.sum()))
    network = Network(ACTIVATIONS[activation], 0.0, 0.0, wide=leaves[0].dtype)
    return lean.lean_network(products, leaves[0], stacks_of(leaves), work, network)


def plainly(leaves: list[Tensor], activation: str) -> Tensor:
    """Token by token and choice by choice."""
    x, weights, fc1, fc2, *biases = leaves
    b1, b2 = biases or (torch.zeros(fc1.shape[:2]), torch.zeros(fc2.shape[:2]))
    rows = []
    for token in range(T):
        y = torch.zeros(D, dtype=x.dtype)
        for choice in range(2):
            if KEPT[token, choice]:
                e = int(IDS[token, choice])
                hidden = ACTIVATIONS[activation](fc1[e] @ x[token] + b1[e].to(x.dtype))
                y = y + weights[token, choice] * (fc2[e] @ hidden + b2[e].to(x.dtype))
        rows.append(y)
    return torch.stack(rows)


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))


@pytest.mark.usefixtures("_with_and_without_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_every_gradient(activation: str, biased: bool, dtype: torch.dtype) -> None:
    leaves = leaves_of(activation, biased=biased, dtype=dtype)
    out = lean_result(leaves, activation)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    slow = plainly(exact, activation)
    tolerance = 1e-5 if dtype is torch.float32 else 0.06
    found, expected = (out, *gradients(out, leaves)), (slow, *gradients(slow, exact))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a.detach().double(), b.detach(), atol=tolerance, rtol=tolerance)
    assert not found[2][~KEPT].any()  # weights of what was dropped
    assert not found[3][3].any()  # the expert without rows


@pytest.mark.parametrize("make", [lambda c: LoopProducts(c, wide=torch.float64), BatchedProducts])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "tanh"])
def test_numerical_derivatives(
    activation: str, biased: bool, dropout: float, make: Callable[[tuple[int, ...]], Products]
) -> None:
    leaves = leaves_of(activation, biased=biased, dtype=torch.float64)
    counts_L = tuple(DECISION.counts.kept_E.tolist())
    plan = plan_rows(DECISION).first(sum(counts_L))

    def run(*values: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same masks for each of gradcheck's calls
        work = ExpertWork(counts_L=counts_L, plan=plan, weights_R=take_weights(values[1], plan))
        network = Network(ACTIVATIONS[activation], dropout, dropout, wide=torch.float64)
        return lean.lean_network(make(counts_L), values[0], stacks_of(list(values)), work, network)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen: int) -> None:
    leaves = leaves_of("gelu", biased=True)
    everything = gradients(lean_result(leaves, "gelu"), leaves)
    leaves[frozen].requires_grad_(False)
    out = lean_result(leaves, "gelu")
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    for index, leaf in enumerate(leaves):
        if index == frozen:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, everything[index])


@pytest.mark.parametrize("network", ["loop_network", "batched_network"])
def test_kernels_that_count_on_the_host_take_it_off_the_cpu(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def noted(products: Products, *args: Any) -> Tensor:
        taken.append(type(products))
        return lean.lean_network(products, *args)

    leaves, counts_L = leaves_of("gelu", biased=True), tuple(DECISION.counts.kept_E.tolist())
    plan = plan_rows(DECISION).first(sum(counts_L))
    work = ExpertWork(counts_L=counts_L, plan=plan, weights_R=take_weights(leaves[1], plan))
    settings = Network(F.gelu, 0.0, 0.0, wide=torch.float32)
    run = getattr(by_matrix, network)
    on_cpu = run(leaves[0], stacks_of(leaves), work, settings)
    monkeypatch.setattr(by_matrix, "composed_network", noted)
    torch.testing.assert_close(on_cpu, run(leaves[0], stacks_of(leaves), work, settings))
    assert len(taken) == 1


def kept_bytes(function: Callable[[], Any], given: Iterator[Tensor]) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, but those that it was given."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in given}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return total


@pytest.mark.parametrize("activation", [F.gelu, swiglu], ids=["gelu", "swiglu"])
def test_a_layer_keeps_its_input_and_the_values_before_the_activation(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens, width, hidden, top_k = 96, 64, 48, 2
    torch.manual_seed(0)
    layer = MoELayer(
        router=Router(model_dim=width, num_experts=E, config=TopKConfig(score=ScoreRule(top_k=top_k))),
        experts=Experts(
            num_local_experts=E, first_expert_id=0, model_dim=width, hidden_dim=hidden, activation=activation
        ),
        dispatcher=LocalDispatcher(),
    ).bfloat16()
    monkeypatch.setattr("fairseq_moe.modules.experts.choose_kernel", lambda *args, **kwargs: "grouped")
    x = torch.randn(num_tokens, width, dtype=torch.bfloat16, requires_grad=True)
    tokens = TokenInfo(mode=RouterMode.TRAIN)
    kept = kept_bytes(lambda: layer(x, tokens=tokens), iter([x, *layer.parameters()]))
    rows = num_tokens * top_k
    outputs = hidden * (2 if activation is swiglu else 1)
    # The input is the caller's; numbers per token and expert are the router's.
    assert 2 * outputs * rows <= kept <= 2 * outputs * rows + 16 * rows + 16 * num_tokens * E
