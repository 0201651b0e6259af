"""The three dispatchers give the same outputs and gradients; here on one rank, on several in tests/distributed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules import Experts, LocalDispatcher, MoELayer, Router, RouterMode, TokenInfo, TopKConfig
from fairseq_moe.modules.dispatch.allgather import AllGatherDispatcher
from fairseq_moe.modules.dispatch.exchange import LocalExchange
from fairseq_moe.modules.dispatch.padded import plan_padded
from fairseq_moe.modules.routing.scores import ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice
from tests.helpers.layer_stats import load_of

D, H, E = 8, 16, 4


def layer(kind: str, factor: float | None, max_tokens: int | None = None) -> MoELayer:
    torch.manual_seed(0)
    config = TopKConfig(
        score=ScoreRule(top_k=2),
        capacity=CapacityConfig(factor=factor, max_tokens=max_tokens),
        aux_losses=frozenset({"aux", "z"}),
    )
    dispatcher = {
        "alltoall": LocalDispatcher(),
        "padded": LocalDispatcher(plan=plan_padded),
        "allgather": AllGatherDispatcher(LocalExchange(), first_expert_id=0),
    }[kind]
    experts = Experts(
        num_local_experts=E,
        first_expert_id=0,
        model_dim=D,
        hidden_dim=H,
        activation=F.gelu,
    )
    router = Router(model_dim=D, num_experts=E, config=config)
    return MoELayer(router=router, experts=experts, dispatcher=dispatcher).double()


def outputs_and_gradients(moe: MoELayer, mode: RouterMode) -> list[Tensor]:
    x = torch.randn(12, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y, aux = moe(x, tokens=TokenInfo(mode=mode))
    (y.square().sum() + aux.losses.sum()).backward()
    return [y.detach(), aux.losses.detach(), load_of(aux), x.grad, *(p.grad for p in moe.parameters())]


@pytest.mark.parametrize("kind", ["padded", "allgather"])
@pytest.mark.parametrize(
    ("factor", "max_tokens"), [(1.0, None), (0.5, 12), (1.0, 20), (100.0, None), (None, None)]
)
@pytest.mark.parametrize("mode", RouterMode)
def test_dispatchers_agree(kind: str, factor: float | None, max_tokens: int | None, mode: RouterMode) -> None:
    expected = outputs_and_gradients(layer("alltoall", factor), mode)
    found = outputs_and_gradients(layer(kind, factor, max_tokens), mode)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_padded_experts_see_the_same_shape_whatever_the_routing() -> None:
    moe = layer("padded", 1.0, max_tokens=20)
    seen = []
    moe.experts.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].shape, tuple(args[1].known_L)))
    )
    for seed in range(3):
        x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        moe(x, tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert set(seen) == {(torch.Size([20 + 1, D]), (10, 10, 10, 10))}  # tokens and the filler


def test_padded_experts_let_the_kernel_know_their_fixed_number_of_rows() -> None:
    moe = layer("padded", 1.0, max_tokens=20)
    seen = []
    moe.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].rows_per_expert))
    x = torch.zeros(20, D, dtype=torch.float64)
    moe(x, tokens=TokenInfo(mode=RouterMode.TRAIN))
    moe(x, tokens=TokenInfo(mode=RouterMode.GENERATE))
    assert seen == [10, None]


def test_nothing_of_every_token_at_every_expert_is_kept() -> None:
    """Expert choice has as many choices per token as there are experts, most of which are not taken."""
    num_tokens, num_experts, dim = 256, 32, 16
    torch.manual_seed(0)
    moe = MoELayer(
        router=Router(
            model_dim=dim,
            num_experts=num_experts,
            config=TopKConfig(
                score=ScoreRule(top_k=2), choice=Choice.EXPERT, capacity=CapacityConfig(factor=1.0)
            ),
        ),
        experts=Experts(
            num_local_experts=num_experts, first_expert_id=0, model_dim=dim, hidden_dim=16, activation=F.gelu
        ),
        dispatcher=LocalDispatcher(plan=plan_padded),
    )
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        moe(torch.randn(num_tokens, dim, requires_grad=True), tokens=TokenInfo(mode=RouterMode.TRAIN))
    assert largest <= max(p.numel() for p in moe.parameters()) < num_tokens * num_experts * dim / 8
