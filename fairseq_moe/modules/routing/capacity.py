"""Decide which assignments are kept when an expert takes only so many: pure functions.

Drops happen before the exchange and on each rank alone: every rank owns ``capacity`` slots at every expert.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fairseq_moe.modules.routing.contract import queue_positions

__all__ = ["CapacityConfig", "DropPolicy", "expert_capacity", "keep_within_capacity"]


class DropPolicy(StrEnum):
    """Say which assignments get the slots of an expert.

    ``probs``: the largest weights. ``position``: the first tokens of the batch, whichever choice the expert
    is of them. ``prioritized``: all first choices before all second ones, tokens in order of their largest
    weight.
    """

    PROBS = "probs"
    POSITION = "position"
    PRIORITIZED = "prioritized"


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """Limit the assignments that an expert takes from each rank: its capacity, C slots.

    Args:
        factor: C = ceil(T * K / E * factor); None: no limit.
        minimum: C is at least this.
        policy: which assignments get the slots.
        num_warmup_updates: the limit holds for so many updates and then no more; None: always.
        max_tokens: tokens of the largest training batch of any rank, which fixes the number of slots of a padded
            dispatch; None: not known.
    """

    factor: float | None = None
    minimum: int = 0
    policy: DropPolicy = DropPolicy.PROBS
    num_warmup_updates: int | None = None
    max_tokens: int | None = None


def expert_capacity(num_tokens: int, num_experts: int, *, top_k: int, factor: float, minimum: int = 0) -> int:
    """Compute the slots of each expert for one rank: ceil(T * K / E * factor), at least ``minimum``."""
    return max(math.ceil(num_tokens * top_k / num_experts * factor), minimum)


@torch.no_grad()
def keep_within_capacity(
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    requested_TK: Tensor,
    *,
    num_experts: int,
    capacity: int | Tensor,
    policy: DropPolicy,
) -> Tensor:
    """Keep the requested assignments that get one of their expert's slots.

    Args:
        expert_ids_TK: int64.
        weights_TK: float weights.
        requested_TK: bool.
        num_experts: E.
        capacity: slots per expert.
        policy: who is first. Ties fall to the earlier token.

    Returns:
        bool (T, K).
    """
    num_tokens, top_k = expert_ids_TK.shape
    if policy is DropPolicy.PRIORITIZED:
        priority_T = weights_TK.amax(-1)
        positions_TK = queue_positions(
            expert_ids_TK, requested_TK, num_experts=num_experts, priority_T=priority_T
        )
        return requested_TK & (positions_TK < capacity)
    # One queue over all choices: each (token, choice) pair is a token with a single choice.
    ids_A1 = expert_ids_TK.reshape(-1, 1)
    priority_A = weights_TK.reshape(-1) if policy is DropPolicy.PROBS else None
    positions_A1 = queue_positions(
        ids_A1, requested_TK.reshape(-1, 1), num_experts=num_experts, priority_T=priority_A
    )
    return requested_TK & (positions_A1.view(num_tokens, top_k) < capacity)
