"""Declare what every routing rule takes and gives, and count and queue assignments for all of them.

An *assignment* is a (token, choice) pair. Routing has two halves. The *decision* is made of integers: chosen experts,
which assignments are requested, which are kept. It has no gradient, and a recomputed forward pass reuses it. The
*weights* are differentiable functions of the gate probabilities and of a decision.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "LOSSES",
    "AssignmentCounts",
    "MicroBatch",
    "RouterMode",
    "RouterOutput",
    "RoutingDecision",
    "RoutingRule",
    "SequenceCounts",
    "TokenInfo",
    "count_assignments",
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
    """Say what the tokens are for; it selects the capacity rule, and whether random numbers may be drawn."""

    TRAIN = "train"
    EVAL = "eval"
    GENERATE = "generate"


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """Describe tokens by what a rule needs besides their values.

    Args:
        mode: what they are for.
        padding_T: bool, True where a token is padding; None: no token is.
        ids_T: int64, vocabulary ids; hash routing needs them.
        num_sequences: B, sequences of equal length that the tokens form, batch-major.
        num_positions: positions of each that these tokens are, where others follow that are no tokens; None: all.
    """

    mode: RouterMode
    padding_T: Tensor | None = None
    ids_T: Tensor | None = None
    num_sequences: int = 1
    num_positions: int | None = None


class AssignmentCounts(NamedTuple):
    """Count the assignments of a micro-batch, in one histogram that losses, dispatch, statistics and bias share.

    Counts of parts of a micro-batch may be added (``of`` the sum of their histograms) before anything is made of them.

    Args:
        histogram_34E: int64, by choice (first, second, all later ones), by fate (kept, dropped, not requested, padding
            that is left out of everything) and by expert.
        requested_E: int64, requested assignments of each expert.
        kept_E: int64, those that were kept.
    """

    histogram_34E: Tensor
    requested_E: Tensor
    kept_E: Tensor

    @classmethod
    def of(cls, histogram_34E: Tensor) -> "AssignmentCounts":
        """Sum a histogram up by expert."""
        kept_E, dropped_E, *_ = histogram_34E.sum(0)
        return cls(histogram_34E, kept_E + dropped_E, kept_E)

    def num_tokens(self) -> Tensor:
        """Count the tokens that are not left out, as every token has one first choice: int64 scalar."""
        return self.histogram_34E[0, :3].sum()

    def first_choices(self) -> Tensor:
        """Count the requested first choices of each expert: int64 (E,)."""
        return self.histogram_34E[0, :2].sum(0)


class SequenceCounts(NamedTuple):
    """Count the choices of each sequence, and its tokens that are no padding: int64."""

    choices_BE: Tensor
    tokens_B: Tensor


class MicroBatch(NamedTuple):
    """Count a micro-batch whose tokens are spread over R ranks, on all of them together: int64.

    Args:
        counts: of all ranks' assignments.
        tokens_R: tokens of each rank, padding included.
        num_valid: tokens that are no padding, scalar.
        plain_choices_E: choices that a balance loss goes by where those differ from the ``counts``; None otherwise.
        sequences: of whole sequences, for the loss that goes by them; None without it.
    """

    counts: AssignmentCounts
    tokens_R: Tensor
    num_valid: Tensor
    plain_choices_E: Tensor | None
    sequences: SequenceCounts | None


@dataclass(frozen=True, kw_only=True)
class RoutingDecision:
    """Decide where each token goes; no gradients. ``RoutingDecision.counted`` makes one.

    Args:
        expert_ids_TK: int64, chosen experts, first choice first.
        requested_TK: bool, assignments that ask for a slot: not padding, not left out by the second-expert
            policy.
        kept_TK: bool, requested assignments that found a slot within the capacity.
        counts: of these assignments, on their device; dispatch goes by them.
        capacity: assignments that each expert takes from this rank, at most (masked padding makes it fewer); None:
            unlimited.
        num_slots: slots of each expert where shapes are fixed, at least the capacity, the same on all ranks; None:
            as many as assignments are kept.
        balance_counts_2E: int64, choices that a balance loss goes by where those differ from the ones above: of
            this micro-batch, and of all ranks and micro-batches of the update so far; None otherwise.
        left_out_T: bool, tokens that no statistic is about; None: it is about all of them.
        micro_batch: counts of all ranks that have tokens of this micro-batch, which losses and statistics go by; kept,
            so that a recomputed pass asks no other rank; None: the tokens here are all.
    """

    expert_ids_TK: Tensor
    requested_TK: Tensor
    kept_TK: Tensor
    counts: AssignmentCounts
    capacity: int | None
    num_slots: int | None = None
    balance_counts_2E: Tensor | None = None
    left_out_T: Tensor | None = None
    micro_batch: MicroBatch | None = None

    @classmethod
    def counted(
        cls,
        *,
        expert_ids_TK: Tensor,
        requested_TK: Tensor,
        kept_TK: Tensor,
        num_experts: int,
        capacity: int | None,
        num_slots: int | None = None,
        padding_T: Tensor | None = None,
    ) -> "RoutingDecision":
        """Make a decision and count its assignments; those of ``padding_T`` are left out of every statistic."""
        return cls(
            expert_ids_TK=expert_ids_TK,
            requested_TK=requested_TK,
            kept_TK=kept_TK,
            counts=count_assignments(
                expert_ids_TK, requested_TK, kept_TK, num_experts=num_experts, padding_T=padding_T
            ),
            capacity=capacity,
            num_slots=num_slots,
            left_out_T=padding_T,
        )

    @property
    def num_experts(self) -> int:
        """Number of experts on all ranks: E."""
        return len(self.counts.kept_E)


class RouterOutput(NamedTuple):
    """Hold the results of routing.

    A tuple that starts with a tensor, because hooks of the kind that fairseq's search for NaNs puts on every
    module look for the first tensor of its output.

    Args:
        gates_TE: normalised scores, differentiable.
        weights_TK: combine weights, differentiable, in the dtype of the scores; the experts round them.
        decision: who goes where.
        losses: unscaled auxiliary losses by name, differentiable; those of ``LOSSES`` that the rule has. Where the
            micro-batch's tokens are spread over ranks they are shares, whose sum over those ranks is the loss.
        entropy_T: float32, of each token's gates (see ``stats.gate_entropy``), where the rule knows it already.
    """

    gates_TE: Tensor
    weights_TK: Tensor
    decision: RoutingDecision
    losses: dict[str, Tensor]
    entropy_T: Tensor | None = None


class RoutingRule(Protocol):
    """Route by logits: make a decision, weights and losses."""

    def route(
        self,
        logits_TE: Tensor,
        tokens: TokenInfo,
        decision: RoutingDecision | None = None,
        *,
        bias_E: Tensor | None = None,
    ) -> RouterOutput:
        """Route tokens by their logits.

        Args:
            logits_TE: float router logits.
            tokens: about the tokens.
            decision: reuse this decision (a recomputed forward pass) instead of taking one.
            bias_E: float32, moves choices and never weights.
        """
        ...

    def set_num_updates(self, num_updates: int) -> None:
        """Note how many updates are done, for what is scheduled by them."""
        ...


def count_ids(ids: Tensor, *, size: int, counted: Tensor | None = None) -> Tensor:
    """Count how often each of 0..size-1 occurs in the int64 vector ``ids``; larger ids raise.

    ``torch.bincount`` would do, but it waits for the device to learn the largest id.

    Args:
        ids: int64.
        size: number of counts.
        counted: bool of the same shape, the ids that count; None: all.
    """
    ones = torch.ones_like(ids) if counted is None else counted.to(ids.dtype)
    return ids.new_zeros(size).scatter_add_(0, ids, ones)


def count_assignments(
    expert_ids_TK: Tensor,
    requested_TK: Tensor,
    kept_TK: Tensor,
    *,
    num_experts: int,
    padding_T: Tensor | None = None,
) -> AssignmentCounts:
    """Count assignments by choice, fate and expert.

    Args:
        expert_ids_TK: int64, those that are not requested included.
        requested_TK: bool.
        kept_TK: bool, some of the requested ones.
        num_experts: E.
        padding_T: bool, tokens to leave out, which request nothing; None: all tokens count.
    """
    fate_TK = 2 - requested_TK.long() - kept_TK.long()
    if padding_T is not None:
        fate_TK = fate_TK + padding_T.long().unsqueeze(-1)
    choice_K = torch.arange(expert_ids_TK.shape[1], device=expert_ids_TK.device).clamp(max=2)
    bins_TK = (4 * choice_K + fate_TK) * num_experts + expert_ids_TK
    counts = count_ids(bins_TK.reshape(-1), size=12 * num_experts)
    return AssignmentCounts.of(counts.view(3, 4, num_experts))


def queue_positions(
    expert_ids_TK: Tensor, requested_TK: Tensor, *, num_experts: int, priority_T: Tensor | None = None
) -> Tensor:
    """Number the requested assignments in each expert's queue, from 0.

    All first choices stand before all second choices; within a choice tokens stand in order, or by
    descending ``priority_T`` when it is given (ties in token order).

    Args:
        expert_ids_TK: int64.
        requested_TK: bool; other assignments do not queue.
        num_experts: E.
        priority_T: float, larger goes first.

    Returns:
        int64 (T, K); meaningless where not requested.
    """
    num_tokens, top_k = expert_ids_TK.shape
    # What is not requested queues for an expert that does not exist, behind all others.
    ids_TK = expert_ids_TK.masked_fill(~requested_TK, num_experts)
    order_T = None
    if priority_T is not None:
        order_T = torch.argsort(priority_T, descending=True, stable=True)
        ids_TK = ids_TK[order_T]
    # Choice by choice: a stable sort by expert then keeps all first choices before all second ones.
    ids_KT = ids_TK.t().reshape(-1)
    sorted_ids, by_expert = torch.sort(ids_KT, stable=True)
    # A queue starts where its expert's id stands first in the sorted list. (A histogram would do, at the price of one
    # more scatter.)
    starts_E = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device=ids_KT.device))
    positions = torch.arange(ids_KT.numel(), device=ids_KT.device) - starts_E[sorted_ids]
    positions_KT = torch.empty_like(ids_KT).scatter_(0, by_expert, positions)
    positions_TK = positions_KT.view(top_k, num_tokens).t()
    if order_T is not None:  # back to the order of the tokens
        positions_TK = torch.empty_like(positions_TK).index_copy_(0, order_T, positions_TK)
    return positions_TK
