"""The contract of routing rules: what every rule takes and gives, and the counting that all of them share.

Routing has two halves. The *decision* is made of integers: chosen experts, place in each expert's queue, who
is kept. It has no gradient, and a recomputed forward pass reuses it. The *weights* are differentiable
functions of the gate probabilities and of a decision.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "LOSSES",
    "RouterMode",
    "RouterOutput",
    "RoutingDecision",
    "RoutingRule",
    "TokenInfo",
    "count_choices",
    "count_ids",
    "queue_positions",
]

# Order of a layer's auxiliary losses, all unscaled:
LOSSES = (
    "balance",  # the moe branch's l_aux, over first choices
    "aux",  # choices of this micro-batch
    "seq_aux",  # choices of each sequence
    "global_aux",  # choices of all ranks and micro-batches of the update so far
    "z",  # size of the logits
)


class RouterMode(Enum):
    """What the tokens are for; it selects the capacity rule, and whether random numbers may be drawn."""

    TRAIN = "train"
    EVAL = "eval"
    GENERATE = "generate"


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What a rule knows of the tokens besides their values.

    Args:
        mode: what they are for.
        padding_T: bool, True where a token is padding; None: no token is.
        ids_T: int64, vocabulary ids; hash routing needs them.
        num_sequences: B, sequences of equal length that the tokens form, batch-major.
    """

    mode: RouterMode
    padding_T: Tensor | None = None
    ids_T: Tensor | None = None
    num_sequences: int = 1


@dataclass(frozen=True, kw_only=True)
class RoutingDecision:
    """Where each token goes; no gradients.

    Args:
        expert_ids_TK: int64, chosen experts, first choice first.
        wanted_TK: bool, assignments that ask for a place: not padding, not left out by the second-expert
            policy.
        kept_TK: bool, wanted assignments that found a place within the capacity.
        capacity: rows that each expert takes from this rank, at most (masked padding makes it fewer); None: unlimited.
        num_places: rows that each expert has room for where shapes are fixed, at least the capacity, the same on
            all ranks; None: as many as are kept.
        balance_counts_2E: int64, choices that a balance loss goes by where those differ from the ones above: of
            this micro-batch, and of all ranks and micro-batches of the update so far; None otherwise.
    """

    expert_ids_TK: Tensor
    wanted_TK: Tensor
    kept_TK: Tensor
    capacity: int | None
    num_places: int | None = None
    balance_counts_2E: Tensor | None = None


class RouterOutput(NamedTuple):
    """What routing yields.

    A tuple that starts with a tensor, because hooks of the kind that fairseq's search for NaNs puts on every
    module look for the first tensor of its output.

    Args:
        gates_TE: normalised scores, differentiable.
        weights_TK: combine weights, differentiable, in the dtype of the scores; the experts round them.
        decision: who goes where.
        losses: unscaled auxiliary losses by name, differentiable; those of ``LOSSES`` that the rule has.
    """

    gates_TE: Tensor
    weights_TK: Tensor
    decision: RoutingDecision
    losses: dict[str, Tensor]


class RoutingRule(Protocol):
    """From logits to a decision, weights and losses."""

    def route(self, logits_TE: Tensor, tokens: TokenInfo, decision: RoutingDecision | None) -> RouterOutput:
        """Route tokens.

        Args:
            logits_TE: float router logits.
            tokens: about the tokens.
            decision: reuse this decision (a recomputed forward pass) instead of taking one.
        """
        ...


def count_ids(ids: Tensor, *, size: int) -> Tensor:
    """How often each of 0..size-1 occurs in the int64 vector ``ids``; larger ids raise.

    ``torch.bincount`` would do, but it waits for the device to learn the largest id.
    """
    return ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids))


def count_choices(expert_ids: Tensor, counted: Tensor, *, num_experts: int) -> Tensor:
    """How often each expert is chosen: int64 (E,).

    Args:
        expert_ids: int64, of any shape; any value where not counted.
        counted: bool, broadcastable to that shape.
        num_experts: E.
    """
    ids = expert_ids.masked_fill(~counted, num_experts)
    return count_ids(ids.reshape(-1), size=num_experts + 1)[:num_experts]


def queue_positions(
    expert_ids_TK: Tensor, wanted_TK: Tensor, *, num_experts: int, priority_T: Tensor | None = None
) -> Tensor:
    """Place of each assignment in its expert's queue, counted from 0.

    All first choices stand before all second choices; within a choice tokens stand in order, or by
    descending ``priority_T`` when it is given (ties in token order).

    Args:
        expert_ids_TK: int64.
        wanted_TK: bool; assignments that are not wanted take no place.
        num_experts: E.
        priority_T: float, larger goes first.

    Returns:
        int64 (T, K); meaningless where not wanted.
    """
    num_tokens, top_k = expert_ids_TK.shape
    ids_TK = expert_ids_TK.masked_fill(~wanted_TK, num_experts)
    order_T = None
    if priority_T is not None:
        order_T = torch.argsort(priority_T, descending=True, stable=True)
        ids_TK = ids_TK[order_T]
    ids_KT = ids_TK.t().reshape(-1)
    sorted_ids, by_expert = torch.sort(ids_KT, stable=True)
    counts = count_ids(ids_KT, size=num_experts + 1)
    starts = torch.cumsum(counts, 0) - counts
    places = torch.arange(ids_KT.numel(), device=ids_KT.device) - starts[sorted_ids]
    positions_KT = torch.empty_like(ids_KT).scatter_(0, by_expert, places)
    positions_TK = positions_KT.view(top_k, num_tokens).t()
    if order_T is not None:
        positions_TK = torch.empty_like(positions_TK).index_copy_(0, order_T, positions_TK)
    return positions_TK
