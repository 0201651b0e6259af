"""Build small routers, and tokens for them."""

from typing import Any

import torch
from torch import Tensor

from fairseq_moe.modules import (
    Router,
    RouterMode,
    ScorerConfig,
    TokenInfo,
    TopKConfig,
)
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice

__all__ = [
    "EVAL",
    "SIGMOID",
    "SIGN",
    "TRAIN",
    "D",
    "E",
    "balanced_logits",
    "make_router",
    "router_of",
    "tokens",
]

E, D = 4, 6
TRAIN = TokenInfo(mode=RouterMode.TRAIN)
EVAL = TokenInfo(mode=RouterMode.EVAL)
SIGN = BiasConfig(rule=BiasRule.SIGN)
SIGMOID = ScoreRule(top_k=2, function=ScoreFunction.SIGMOID)


def make_router(
    *,
    score: ScoreRule = SIGMOID,
    losses: set[str] | None = None,
    choice: Choice = Choice.TOKEN,
    capacity: CapacityConfig | None = None,
    num_experts: int = E,
    bias: BiasConfig | None = None,
    **scorer: Any,
) -> Router:
    torch.manual_seed(0)
    config = TopKConfig(
        score=score, choice=choice, capacity=capacity or CapacityConfig(), aux_losses=frozenset(losses or ())
    )
    return Router(
        model_dim=D, num_experts=num_experts, config=config, scorer=ScorerConfig(**scorer), balance=bias
    )


def tokens(number: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed))


def balanced_logits() -> Tensor:
    """L2 of tests/numerics/test_routing_fixtures.py."""
    tokens_T1, experts_E = torch.arange(8).unsqueeze(1), torch.arange(4)
    return ((7 * tokens_T1 + 13 * experts_E) % 17) / 4 - 2.0 + torch.tensor([1.0625, 0.5, 0.0, -1.03125])


def router_of(logits: Tensor, rate: float = 1e-2, **options: Any) -> tuple[Router, Tensor]:
    """A router and tokens that it gives these logits."""
    router = make_router(bias=BiasConfig(rule=BiasRule.SIGN, update_rate=rate), **options)
    router.weight = torch.nn.Parameter(logits.t().contiguous())
    return router, torch.eye(len(logits))
