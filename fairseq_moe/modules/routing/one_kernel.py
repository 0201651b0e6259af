"""Route by the common rule of the top-k family in one kernel: no groups, no capacity, each token by its scores alone.

On a GPU ``fused.top_k`` reads the logits once where the rule in ``topk`` takes a launch for each step; everything else
is routed there.
"""

import torch
from torch import Tensor

from fairseq_moe.fused.top_k import Scoring, runs_top_k, top_k
from fairseq_moe.modules.routing.contract import AssignmentCounts, RouterOutput, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule

__all__ = ["fits_one_kernel", "route_in_one_kernel"]


def fits_one_kernel(logits_TE: Tensor, rule: ScoreRule) -> bool:
    """Tell whether the kernel computes these scores, of these logits."""
    return (
        rule.function in (ScoreFunction.SOFTMAX, ScoreFunction.SIGMOID)
        and rule.num_groups is None
        and runs_top_k(logits_TE, top_k=rule.top_k)
    )


def route_in_one_kernel(
    logits_TE: Tensor,
    rule: ScoreRule,
    tokens: TokenInfo,
    decision: RoutingDecision | None = None,
    *,
    bias_E: Tensor | None = None,
) -> RouterOutput:
    """Route tokens to their best experts, without losses; see ``RoutingRule``."""
    kind = "sigmoid"
    if rule.function is ScoreFunction.SOFTMAX:
        kind = "softmax" if rule.pre_softmax else "chosen"
    found = top_k(
        logits_TE,
        Scoring(kind=kind, top_k=rule.top_k, scale=rule.scaling_factor, by_probability=rule.by_probability),
        bias_E=bias_E,
        padding_T=tokens.padding_T,
        ids_TK=None if decision is None else decision.expert_ids_TK,
    )
    if decision is None:
        assert found.histogram_34E is not None
        decision = _without_drops(found.ids_TK, found.histogram_34E, tokens.padding_T)
    return RouterOutput(
        gates_TE=found.gates_TE,
        weights_TK=found.weights_TK,
        decision=decision,
        losses={},
        entropy_T=found.entropy_T,
    )


def _without_drops(ids_TK: Tensor, histogram_34E: Tensor, padding_T: Tensor | None) -> RoutingDecision:
    if padding_T is None:
        kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    else:
        kept_TK = (~padding_T).unsqueeze(-1).expand_as(ids_TK)
    return RoutingDecision(
        expert_ids_TK=ids_TK,
        requested_TK=kept_TK,
        kept_TK=kept_TK,
        counts=AssignmentCounts.of(histogram_34E),
        capacity=None,
        left_out_T=padding_T,
    )
