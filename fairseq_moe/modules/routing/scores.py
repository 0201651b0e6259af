"""Score experts, and weigh those that were chosen: pure functions of router logits.

Three score functions: ``softmax`` over all experts, ``sigmoid`` (DeepSeek-V3, arXiv 2412.19437, equation 16)
and ``sqrtsoftplus``. Each says by what experts are chosen, what a chosen expert weighs, and which normalised
scores the balance losses see.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "GroupScore",
    "ScoreFunction",
    "ScoreRule",
    "choice_scores",
    "normalized_scores",
    "raw_scores",
    "token_choice",
    "weights_of_choice",
]

# Keeps a sum of sigmoid scores from being 0 without being large enough to reward small scores: 1e-20 is a
# normal float32, and a score sum near it means logits below -45.
_TINY = 1e-20


class ScoreFunction(StrEnum):
    """Say what a router logit means."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrtsoftplus"


class GroupScore(StrEnum):
    """Say what a group's score is: the sum of its best floor(k / groups kept), of its best two, or its maximum."""

    SUM_OF_BEST = "sum"
    BEST_TWO = "best_two"
    MAXIMUM = "max"


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """Configure how tokens choose experts.

    Args:
        top_k: K.
        function: what a logit means.
        pre_softmax: with softmax, weights are probabilities over all experts, not renormalised; otherwise
            they are the softmax over the chosen logits. Ignored by the other functions.
        by_probability: with softmax, experts and groups are compared by probabilities over all experts even where
            weights are not, so that a bias means the same for every token. Ignored by the other functions.
        scaling_factor: multiplies all weights.
        num_groups: groups of neighbouring experts; None: no groups.
        group_topk: groups from which a token may choose.
        group_score: how groups are compared.
    """

    top_k: int
    function: ScoreFunction = ScoreFunction.SOFTMAX
    pre_softmax: bool = False
    by_probability: bool = False
    scaling_factor: float = 1.0
    num_groups: int | None = None
    group_topk: int | None = None
    group_score: GroupScore = GroupScore.SUM_OF_BEST


def raw_scores(logits_TE: Tensor, function: ScoreFunction) -> Tensor:
    """Score each expert in the dtype of the logits: (T, E) -> (T, E)."""
    if function is ScoreFunction.SOFTMAX:
        return F.softmax(logits_TE, dim=-1)
    if function is ScoreFunction.SIGMOID:
        return torch.sigmoid(logits_TE)
    return F.softplus(logits_TE).sqrt()


def normalized_scores(logits_TE: Tensor, function: ScoreFunction) -> Tensor:
    """Normalise the scores to sum 1 per token, as the balance losses take them."""
    scores_TE = raw_scores(logits_TE, function)
    if function is ScoreFunction.SOFTMAX:
        return scores_TE
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)


def choice_scores(logits_TE: Tensor, rule: ScoreRule, *, bias_E: Tensor | None = None) -> Tensor:
    """Compute the scores by which experts are compared: float (T, E), -inf outside a token's groups.

    Args:
        logits_TE: float router logits.
        rule: the rule.
        bias_E: float, added to the scores; it moves choices and never weights.
    """
    if rule.function is ScoreFunction.SOFTMAX:
        is_probability = rule.pre_softmax or rule.by_probability
        scores_TE = F.softmax(logits_TE, dim=-1) if is_probability else logits_TE
    else:
        scores_TE = raw_scores(logits_TE, rule.function)
    if bias_E is not None:
        scores_TE = scores_TE + bias_E.to(scores_TE.dtype)
    if rule.num_groups is None:
        return scores_TE
    return scores_TE.masked_fill(~_allowed_experts(scores_TE, rule), float("-inf"))


def _allowed_experts(scores_TE: Tensor, rule: ScoreRule) -> Tensor:
    """Mark the experts of each token's best groups, bool (T, E) (DeepSeek-V2, arXiv 2405.04434, section 2.2.2)."""
    assert rule.num_groups is not None and rule.group_topk is not None
    num_tokens, num_experts = scores_TE.shape
    grouped = scores_TE.view(num_tokens, rule.num_groups, num_experts // rule.num_groups)
    if rule.group_score is GroupScore.MAXIMUM:
        group_scores = grouped.amax(-1)
    else:
        best = 2 if rule.group_score is GroupScore.BEST_TWO else rule.top_k // rule.group_topk
        group_scores = grouped.topk(best, dim=-1).values.sum(-1)
    chosen = group_scores.topk(rule.group_topk, dim=-1).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, chosen, True)
    return allowed.repeat_interleave(num_experts // rule.num_groups, dim=-1)


def token_choice(scores_TE: Tensor, top_k: int) -> Tensor:
    """Choose the K best experts of each token, best first: int64 (T, K)."""
    return scores_TE.topk(top_k, dim=-1).indices


def weights_of_choice(logits_TE: Tensor, expert_ids_TK: Tensor, rule: ScoreRule) -> Tensor:
    """Weigh each choice, differentiably: (T, K); dropping some renormalises nothing."""
    if rule.function is ScoreFunction.SOFTMAX and not rule.pre_softmax:
        weights_TK = F.softmax(logits_TE.gather(-1, expert_ids_TK), dim=-1)
    else:
        weights_TK = raw_scores(logits_TE, rule.function).gather(-1, expert_ids_TK)
        if rule.function is not ScoreFunction.SOFTMAX and rule.top_k > 1:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    return weights_TK if rule.scaling_factor == 1.0 else weights_TK * rule.scaling_factor
