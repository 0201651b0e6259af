"""Route a few tokens by a top-k rule, and list what each token gets."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules import RouterMode, TokenInfo
from fairseq_moe.modules.routing.contract import RouterOutput
from fairseq_moe.modules.routing.scores import ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, TopKConfig, TopKRule

__all__ = ["TRAIN", "E", "T", "assert_same", "kept", "logits", "make_rule", "route"]

T, E = 24, 8
TRAIN = RouterMode.TRAIN


def logits(seed: int = 0, num_tokens: int = T, num_experts: int = E) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)


def make_rule(*, bias: list[float] | None = None, **options: Any) -> TopKRule:
    """Options of ScoreRule, CapacityConfig and TopKConfig mixed."""
    parts = {
        kind: {name: options.pop(name) for name in list(options) if name in kind.__dataclass_fields__}
        for kind in (ScoreRule, CapacityConfig, TopKConfig)
    }
    score = ScoreRule(**{"top_k": 2, **parts[ScoreRule]})
    config = TopKConfig(score=score, capacity=CapacityConfig(**parts[CapacityConfig]), **parts[TopKConfig])
    assert not options
    rule = TopKRule(config)
    if bias is not None:
        rule.route = functools.partial(rule.route, bias_E=torch.tensor(bias))  # type: ignore[method-assign]
    return rule


def route(
    values: Tensor, mode: RouterMode = TRAIN, *, info: dict[str, Any] | None = None, **options: Any
) -> RouterOutput:
    return make_rule(**options).route(values, TokenInfo(mode=mode, **(info or {})), None)


def kept(routed: RouterOutput) -> list[dict[int, float]]:
    """The experts that a token gets, with their weights."""
    rows = zip(
        routed.decision.expert_ids_TK.tolist(),
        routed.weights_TK.tolist(),
        routed.decision.kept_TK.tolist(),
        strict=True,
    )
    return [{expert: weight for expert, weight, is_kept in zip(*row, strict=True) if is_kept} for row in rows]


def assert_same(found: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == {expert: pytest.approx(weight, abs=1e-12) for expert, weight in other.items()}
