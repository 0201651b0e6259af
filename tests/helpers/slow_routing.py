"""Route a second time, token by token in plain Python and float64, to compare with."""

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["keep", "load_balancing_loss", "routes", "sinkhorn"]


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def _scores(logits: Sequence[float], function: str) -> list[float]:
    if function == "softmax":
        return _softmax(logits)
    if function == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    return [math.sqrt(math.log(1 + math.exp(logit))) for logit in logits]


def _best(values: Sequence[float], number: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:number]


def routes(
    logits_TE: Tensor,
    *,
    top_k: int,
    function: str = "softmax",
    pre: bool = False,
    scale: float = 1.0,
    bias: Sequence[float] | None = None,
    by_probability: bool = False,
    groups: tuple[int, int, str] | None = None,
) -> list[dict[int, float]]:
    """Choose experts for each token: one dictionary per token, from expert to weight.

    Args:
        logits_TE: float router logits.
        top_k: K.
        function: softmax, sigmoid or sqrtsoftplus.
        pre: softmax before the choice.
        scale: of all weights.
        bias: added to what experts are compared by.
        by_probability: compare softmax scores, even where weights are those of the chosen logits alone.
        groups: number of groups, groups kept, group score (sum, best_two or max).
    """
    found = []
    for logits in logits_TE.double().tolist():
        scores = _scores(logits, function)
        by_logit = function == "softmax" and not pre and not by_probability
        compared = list(logits) if by_logit else list(scores)
        if bias is not None:
            compared = [value + shift for value, shift in zip(compared, bias, strict=True)]
        if groups is not None:
            compared = _limit(compared, top_k, *groups)
        chosen = _best(compared, top_k)
        if function == "softmax" and not pre:
            weights = _softmax([logits[expert] for expert in chosen])
        else:
            weights = [scores[expert] for expert in chosen]
            if function != "softmax" and top_k > 1:
                weights = [weight / sum(weights) for weight in weights]
        found.append({expert: scale * weight for expert, weight in zip(chosen, weights, strict=True)})
    return found


def _limit(compared: list[float], top_k: int, number: int, kept: int, score: str) -> list[float]:
    size = len(compared) // number
    parts = [sorted(compared[first : first + size], reverse=True) for first in range(0, len(compared), size)]
    best = {"sum": top_k // kept, "best_two": 2, "max": 1}[score]
    allowed = _best([sum(part[:best]) for part in parts], kept)
    return [value if index // size in allowed else -math.inf for index, value in enumerate(compared)]


def keep(choices: list[dict[int, float]], *, capacity: int, policy: str) -> list[dict[int, float]]:
    """Drop from ``routes`` what exceeds the ``capacity`` of each expert."""
    if policy == "prioritized":
        tokens = sorted(range(len(choices)), key=lambda token: -max(choices[token].values(), default=0))
        pairs = [
            (token, list(choices[token])[rank])
            for rank in range(max(map(len, choices)))
            for token in tokens
            if rank < len(choices[token])
        ]
    else:
        pairs = [(token, expert) for token, weights in enumerate(choices) for expert in weights]
        if policy == "probs":
            pairs.sort(key=lambda pair: -choices[pair[0]][pair[1]])
    taken: dict[int, int] = {}
    kept: list[dict[int, float]] = [{} for _ in choices]
    for token, expert in pairs:
        if taken.get(expert, 0) < capacity:
            taken[expert] = taken.get(expert, 0) + 1
            kept[token][expert] = choices[token][expert]
    return kept


def load_balancing_loss(logits_TE: Tensor, counts: Sequence[int], *, function: str = "softmax") -> float:
    """Compute E * sum_e( share of the choices * mean normalised score )."""
    rows = [_scores(logits, function) for logits in logits_TE.double().tolist()]
    rows = [[score / sum(row) for score in row] for row in rows]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return len(means) * sum(count / sum(counts) * mean for count, mean in zip(counts, means, strict=True))


def sinkhorn(logits_TE: Tensor) -> list[list[float]]:
    """Compute the plan without the row-wise shift, until the columns' factors are still."""
    cost = [[math.exp(logit) for logit in row] for row in logits_TE.double().tolist()]
    tokens, experts = len(cost), len(cost[0])
    rows, columns = [1.0] * tokens, [1.0] * experts
    while True:
        rows = [1 / (tokens * (sum(k * c for k, c in zip(row, columns, strict=True)) + 1e-8)) for row in cost]
        new = [
            1 / (experts * (sum(rows[t] * cost[t][e] for t in range(tokens)) + 1e-8)) for e in range(experts)
        ]
        moved = sum(abs(one - other) for one, other in zip(new, columns, strict=True)) / experts
        columns = new
        if moved <= 1e-4:
            return [
                [r * k * c for k, c in zip(row, columns, strict=True)]
                for r, row in zip(rows, cost, strict=True)
            ]
