"""The whole layer against the slow reference and numerical derivatives, in output and every gradient."""

import itertools

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
from fairseq_moe.modules.reference import reference_moe
from fairseq_moe.modules.routing.branch import SecondExpertPolicy, capacity_of

STACKS = ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]


def make_layer(num_experts: int, *, dim: int = 6, dtype: torch.dtype, **config: object) -> MoELayer:
    options: dict[str, object] = {"second_expert_policy": SecondExpertPolicy.ALL, **config}
    layer = MoELayer(
        router=Router(
            model_dim=dim,
            num_experts=num_experts,
            config=BranchConfig(**options),  # type: ignore[arg-type]
        ),
        experts=Experts(
            num_local_experts=num_experts,
            first_expert_id=0,
            model_dim=dim,
            hidden_dim=2 * dim,
            activation=F.gelu,
        ),
        dispatcher=LocalDispatcher(),
    )
    return layer.to(dtype)


def gradients(layer: MoELayer, x_TD: Tensor, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in layer.named_parameters()]
    grads = torch.autograd.grad(loss, [x_TD, *layer.parameters()])
    return dict(zip(["x", *names], grads, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=["float64", "float32"]
)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 2), (7, 3), (24, 4), (16, 16), (30, 2)], ids=str)
def test_equals_the_reference(
    num_tokens: int, num_experts: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(num_tokens)
    layer = make_layer(num_experts, dtype=dtype)
    x = torch.randn(num_tokens, 6, dtype=dtype, requires_grad=True)
    cotangent = torch.randn_like(x)
    y, aux = layer(x, tokens=TokenInfo(mode=RouterMode.TRAIN))
    y_slow, loss_slow = reference_moe(
        x, layer.router.weight, layer.experts, capacity=capacity_of(num_tokens, num_experts, top_k=2)
    )
    torch.testing.assert_close(y, y_slow, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(aux.balance_loss, loss_slow, atol=tolerance, rtol=tolerance)
    fast = gradients(layer, x, (y * cotangent).sum() + aux.balance_loss)
    slow = gradients(layer, x, (y_slow * cotangent).sum() + loss_slow)
    assert fast.keys() == slow.keys() == {"x", "router.weight", *(f"experts.{name}" for name in STACKS)}
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], atol=tolerance, rtol=10 * tolerance, msg=name)


@pytest.mark.parametrize(
    ("top_k", "normalize_before", "padded"), list(itertools.product([1, 2], [False, True], [False, True]))
)
def test_numerical_derivatives_of_the_whole_layer(top_k: int, normalize_before: bool, padded: bool) -> None:
    # Away from ties of the routing the layer is smooth; seed 1 has none within the step of 1e-6.
    torch.manual_seed(1)
    layer = make_layer(3, dim=3, dtype=torch.float64, top_k=top_k, normalize_before_dropping=normalize_before)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([False] * 6 + [True] * 2) if padded else None
    names = [name for name, _ in layer.named_parameters()]

    def run(x_TD: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = torch.func.functional_call(
            layer,
            dict(zip(names, values, strict=True)),
            (x_TD,),
            {"tokens": TokenInfo(mode=RouterMode.TRAIN, padding_T=padding)},
        )
        return y, aux.balance_loss

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("use_fp32", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_half_precision_is_near_float32(dtype: torch.dtype, bound: float, use_fp32: bool) -> None:
    torch.manual_seed(0)
    narrow = make_layer(4, dtype=dtype, gating_use_fp32=use_fp32)
    wide = make_layer(4, dtype=torch.float32)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(12, 6).to(dtype)
    y, aux = narrow(
        x, tokens=TokenInfo(mode=RouterMode.GENERATE)
    )  # nothing is dropped, so a near-tie changes little
    y_wide, aux_wide = wide(x.float(), tokens=TokenInfo(mode=RouterMode.GENERATE))
    assert y.dtype == dtype
    assert aux.balance_loss.dtype == torch.float32
    assert ((y.float() - y_wide).norm() / y_wide.norm()).item() < bound
    torch.testing.assert_close(aux.balance_loss, aux_wide.balance_loss, atol=bound, rtol=bound)
