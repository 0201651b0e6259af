"""The learned bias of a router's logits: weights, losses and gradients see it, in the precision that was asked for."""

from typing import Any

import torch
from torch import Tensor

from fairseq_moe.modules import Router, RouterMode, TokenInfo, TopKConfig
from fairseq_moe.modules.routing.router import ScorerConfig
from fairseq_moe.modules.routing.scores import ScoreRule

D, E = 4, 4
TRAIN = TokenInfo(mode=RouterMode.TRAIN)
EVAL = TokenInfo(mode=RouterMode.EVAL)


def tokens() -> Tensor:
    return torch.randn(10, D, generator=torch.Generator().manual_seed(1))


def biased_router(**scorer: Any) -> Router:
    torch.manual_seed(0)
    config = TopKConfig(score=ScoreRule(top_k=2), aux_losses=frozenset({"aux", "z"}))
    router = Router(model_dim=D, num_experts=E, config=config, scorer=ScorerConfig(bias=True, **scorer))
    assert router.bias is not None and not router.bias.any()
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    return router


def test_a_learned_bias_is_part_of_logits_weights_and_losses() -> None:
    router, x = biased_router(), tokens()
    found = router(x, tokens=TRAIN)
    leaves = [parameter.detach().requires_grad_() for parameter in (router.weight, router.bias)]
    logits = x @ leaves[0].t() + leaves[1]
    best = logits.topk(2)
    assert torch.equal(found.decision.expert_ids_TK, best.indices)
    assert not torch.equal(best.indices, (x @ leaves[0].t()).topk(2).indices)
    torch.testing.assert_close(found.weights_TK, best.values.softmax(-1))
    z = logits.logsumexp(-1).square().mean()
    share_E = torch.bincount(best.indices.flatten(), minlength=E) / best.indices.numel()
    aux = E * (share_E * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(found.losses, {"z": z, "aux": aux})
    upper = torch.linspace(-1, 1, 20).view(10, 2)
    (found.losses["z"] + found.losses["aux"] + (found.weights_TK * upper).sum()).backward()
    expected = torch.autograd.grad(z + aux + (best.values.softmax(-1) * upper).sum(), leaves)
    for parameter, grad in zip((router.weight, router.bias), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_a_learned_bias_in_the_precision_that_was_asked_for() -> None:
    router, x = biased_router(dtype=torch.float32).bfloat16(), tokens().bfloat16()
    gates = router(x, tokens=EVAL).gates_TE
    torch.testing.assert_close(
        gates, (x.float() @ router.weight.float().t() + router.bias.float()).softmax(-1)
    )
    assert router.bias.dtype == torch.bfloat16
