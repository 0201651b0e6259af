"""Which token goes to which expert: pure functions of logits.

Routing has two halves. The *decision* is made of integers: chosen experts, place in each expert's queue, who
is kept. It has no gradient, and a recomputed forward pass reuses it. The *weights* are differentiable
functions of the gate probabilities and of a decision.

The rules are those of GShard (Lepikhin et al. 2020, algorithm 1) for two experts and of Switch Transformer
(Fedus et al. 2021, section 2.1) for one, with the details of fairseq's moe branch.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "RoutingDecision",
    "SecondExpertPolicy",
    "capacity_of",
    "combine_weights",
    "count_choices",
    "count_ids",
    "decide_top1",
    "decide_top2",
    "gate_probabilities",
    "gumbel_noise",
    "queue_positions",
]


class SecondExpertPolicy(StrEnum):
    """How the second expert of a token is chosen while training.

    ``all``: the second most probable expert, always. ``sampling``: drawn in proportion to the gate
    probabilities of the other experts (Gumbel-max). ``random``: the second most probable expert, kept with
    probability min(1, 2 * its weight).

    In evaluation nothing is drawn: ``sampling`` acts as ``all``, and ``random`` keeps the second expert when
    the probability of keeping it is at least one half, that is when its weight is at least 1/4.
    """

    SAMPLING = "sampling"
    RANDOM = "random"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class RoutingDecision:
    """Where each token goes; no gradients.

    Args:
        expert_ids_TK: int64, chosen experts, first choice first.
        wanted_TK: bool, assignments that ask for a place: not padding, not left out by the second-expert
            policy.
        kept_TK: bool, wanted assignments that found a place within the capacity.
        capacity: rows that each expert takes from this rank; None: unlimited.
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


def gate_probabilities(logits_TE: Tensor, *, use_fp32: bool) -> Tensor:
    """Softmax over the experts, in float32 if ``use_fp32`` and the logits are narrower."""
    if use_fp32 and logits_TE.dtype in (torch.float16, torch.bfloat16):
        logits_TE = logits_TE.float()
    return F.softmax(logits_TE, dim=-1)


def capacity_of(
    num_tokens: int, num_experts: int, *, top_k: int, eval_token_fraction: float | None = None
) -> int:
    """Rows that each expert takes from one rank.

    Args:
        num_tokens: tokens of this rank, padding included.
        num_experts: E.
        top_k: 1 or 2 experts per token.
        eval_token_fraction: None while training; in evaluation ceil(fraction * num_tokens) when the fraction
            is above 0, else the training rule.

    Returns:
        top_k * ceil(num_tokens / num_experts) by the training rule.
    """
    if eval_token_fraction is not None and eval_token_fraction > 0:
        return math.ceil(eval_token_fraction * num_tokens)
    return top_k * math.ceil(num_tokens / num_experts)


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


def gumbel_noise(like_TE: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of ``like_TE``, float32 or wider, from torch's global generator."""
    # Half precision has too few numbers near 1, so the largest values would be cut off.
    dtype = torch.promote_types(like_TE.dtype, torch.float32)
    uniform = torch.rand_like(like_TE, dtype=dtype)
    info = torch.finfo(uniform.dtype)
    return -torch.log(-torch.log(uniform.clamp(min=info.tiny, max=1 - info.eps)))


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


@torch.no_grad()
def decide_top1(
    gates_TE: Tensor, *, capacity: int | None, padding_T: Tensor | None = None
) -> RoutingDecision:
    """Each token to its most probable expert, first come first served.

    Args:
        gates_TE: float gate probabilities.
        capacity: rows per expert; None: unlimited.
        padding_T: bool, True where a token is padding and takes no place.
    """
    ids_TK = gates_TE.argmax(dim=-1, keepdim=True)
    wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    return _cut(ids_TK, wanted_TK, gates_TE, capacity, padding_T, prioritized=False)


@torch.no_grad()
def decide_top2(
    logits_TE: Tensor,
    gates_TE: Tensor,
    *,
    capacity: int | None,
    policy: SecondExpertPolicy,
    training: bool,
    normalize_before_dropping: bool = False,
    padding_T: Tensor | None = None,
    prioritized: bool = False,
) -> RoutingDecision:
    """Each token to two experts.

    Args:
        logits_TE: float router logits, in the precision that the gates were computed in.
        gates_TE: float, softmax of the logits.
        capacity: rows per expert; None: unlimited.
        policy: choice of the second expert.
        training: False draws no random numbers.
        normalize_before_dropping: the ``random`` policy looks at g2 / (g1 + g2) instead of g2.
        padding_T: bool, True where a token is padding and takes no place.
        prioritized: tokens queue by descending largest gate probability (V-MoE, Riquelme et al. 2021, 4.1).
    """
    first_T1 = gates_TE.argmax(dim=-1, keepdim=True)
    scores_TE = logits_TE
    if policy is SecondExpertPolicy.SAMPLING and training:
        scores_TE = logits_TE + gumbel_noise(logits_TE)
    if gates_TE.shape[-1] > 1:
        scores_TE = scores_TE.scatter(-1, first_T1, float("-inf"))
    second_T1 = scores_TE.argmax(dim=-1, keepdim=True)
    ids_TK = torch.cat([first_T1, second_T1], dim=-1)
    wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    if policy is SecondExpertPolicy.RANDOM:
        chosen_TK = gates_TE.gather(-1, ids_TK)
        if normalize_before_dropping:
            chosen_TK = _normalized(chosen_TK)
        threshold_T = torch.rand_like(chosen_TK[:, 1]) if training else torch.full_like(chosen_TK[:, 1], 0.5)
        twice_T = 2 * chosen_TK[:, 1]
        wanted_TK[:, 1] = twice_T > threshold_T if training else twice_T >= threshold_T
    return _cut(ids_TK, wanted_TK, gates_TE, capacity, padding_T, prioritized=prioritized)


def _cut(
    ids_TK: Tensor,
    wanted_TK: Tensor,
    gates_TE: Tensor,
    capacity: int | None,
    padding_T: Tensor | None,
    *,
    prioritized: bool,
) -> RoutingDecision:
    if padding_T is not None:
        wanted_TK = wanted_TK & ~padding_T.unsqueeze(-1)
    kept_TK = wanted_TK
    if capacity is not None:
        priority_T = gates_TE.amax(dim=-1) if prioritized else None
        num_experts = gates_TE.shape[-1]
        positions_TK = queue_positions(ids_TK, wanted_TK, num_experts=num_experts, priority_T=priority_T)
        kept_TK = wanted_TK & (positions_TK < capacity)
    return RoutingDecision(expert_ids_TK=ids_TK, wanted_TK=wanted_TK, kept_TK=kept_TK, capacity=capacity)


def combine_weights(
    gates_TE: Tensor, decision: RoutingDecision, *, normalize_before_dropping: bool = False
) -> Tensor:
    """Differentiable weight of each assignment in its token's output; zero where it was not kept.

    One expert: its gate probability. Two: the probabilities divided by their sum, taken over both choices
    before dropping, or over the kept ones after it (then a lone survivor weighs 1).

    Args:
        gates_TE: float gate probabilities.
        decision: a decision about the same tokens.
        normalize_before_dropping: weight lost by dropping stays lost.

    Returns:
        (T, K), dtype of ``gates_TE``.
    """
    chosen_TK = gates_TE.gather(-1, decision.expert_ids_TK)
    kept_TK = decision.kept_TK.to(chosen_TK.dtype)
    if chosen_TK.shape[-1] == 1:
        return chosen_TK * kept_TK
    if normalize_before_dropping:
        return _normalized(chosen_TK) * kept_TK
    return _normalized(chosen_TK * kept_TK)


def _normalized(weights_TK: Tensor) -> Tensor:
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).eps)
