"""The gates of fairseq's moe branch: top-1 and top-2 with its capacity rule and balance loss.

The rules are those of GShard (Lepikhin et al. 2020, algorithm 1) for two experts and of Switch Transformer
(Fedus et al. 2021, section 2.1) for one, with the details of fairseq's moe branch.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.routing.contract import (
    RouterMode,
    RouterOutput,
    RoutingDecision,
    TokenInfo,
    queue_positions,
)
from fairseq_moe.modules.routing.losses import balance_loss
from fairseq_moe.modules.routing.micro_batch import sum_micro_batch
from fairseq_moe.modules.shards import LocalShards, Shards

__all__ = [
    "BranchConfig",
    "BranchRule",
    "SecondExpertPolicy",
    "capacity_of",
    "combine_weights",
    "decide_top1",
    "decide_top2",
    "gate_probabilities",
    "gumbel_noise",
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


def gate_probabilities(logits_TE: Tensor, *, use_fp32: bool) -> Tensor:
    """Take the softmax over the experts, in float32 if ``use_fp32`` and the logits are narrower."""
    if use_fp32 and logits_TE.dtype in (torch.float16, torch.bfloat16):
        logits_TE = logits_TE.float()
    return F.softmax(logits_TE, dim=-1)


def capacity_of(
    num_tokens: int, num_experts: int, *, top_k: int, eval_token_fraction: float | None = None
) -> int:
    """Compute the assignments that each expert takes from one rank.

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


def gumbel_noise(like_TE: Tensor) -> Tensor:
    """Draw standard Gumbel noise of the shape of ``like_TE``, float32 or wider, from torch's global generator."""
    # Half precision has too few numbers near 1, so the largest values would be cut off.
    dtype = torch.promote_types(like_TE.dtype, torch.float32)
    uniform = torch.rand_like(like_TE, dtype=dtype)
    info = torch.finfo(uniform.dtype)
    return -torch.log(-torch.log(uniform.clamp(min=info.tiny, max=1 - info.eps)))


@torch.no_grad()
def decide_top1(
    gates_TE: Tensor, *, capacity: int | None, padding_T: Tensor | None = None
) -> RoutingDecision:
    """Send each token to its most probable expert, first come first served.

    Args:
        gates_TE: float gate probabilities.
        capacity: slots per expert; None: unlimited.
        padding_T: bool, True where a token is padding and takes no slot.
    """
    ids_TK = gates_TE.argmax(dim=-1, keepdim=True)
    requested_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    return _cut(ids_TK, requested_TK, gates_TE, capacity, padding_T, prioritized=False)


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
    """Send each token to two experts.

    Args:
        logits_TE: float router logits, in the precision that the gates were computed in.
        gates_TE: float, softmax of the logits.
        capacity: slots per expert; None: unlimited.
        policy: choice of the second expert.
        training: False draws no random numbers.
        normalize_before_dropping: the ``random`` policy looks at g2 / (g1 + g2) instead of g2.
        padding_T: bool, True where a token is padding and takes no slot.
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
    requested_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    if policy is SecondExpertPolicy.RANDOM:
        chosen_TK = gates_TE.gather(-1, ids_TK)
        if normalize_before_dropping:
            chosen_TK = _normalized(chosen_TK)
        threshold_T = torch.rand_like(chosen_TK[:, 1]) if training else torch.full_like(chosen_TK[:, 1], 0.5)
        twice_T = 2 * chosen_TK[:, 1]
        requested_TK[:, 1] = twice_T > threshold_T if training else twice_T >= threshold_T
    return _cut(ids_TK, requested_TK, gates_TE, capacity, padding_T, prioritized=prioritized)


def _cut(
    ids_TK: Tensor,
    requested_TK: Tensor,
    gates_TE: Tensor,
    capacity: int | None,
    padding_T: Tensor | None,
    *,
    prioritized: bool,
) -> RoutingDecision:
    if padding_T is not None:
        requested_TK = requested_TK & ~padding_T.unsqueeze(-1)
    kept_TK = requested_TK
    if capacity is not None:
        priority_T = gates_TE.amax(dim=-1) if prioritized else None
        positions_TK = queue_positions(
            ids_TK, requested_TK, num_experts=gates_TE.shape[-1], priority_T=priority_T
        )
        kept_TK = requested_TK & (positions_TK < capacity)
    return RoutingDecision.counted(
        expert_ids_TK=ids_TK,
        requested_TK=requested_TK,
        kept_TK=kept_TK,
        num_experts=gates_TE.shape[-1],
        capacity=capacity,
    )


def combine_weights(
    gates_TE: Tensor, decision: RoutingDecision, *, normalize_before_dropping: bool = False
) -> Tensor:
    """Weigh each assignment in its token's output, differentiably; zero where it was not kept.

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


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """Configure how the branch's gates route.

    Args:
        top_k: experts per token, 1 or 2.
        gating_use_fp32: softmax and everything after it in float32.
        second_expert_policy: see ``SecondExpertPolicy``; two experts only.
        normalize_before_dropping: weights are normalised before the capacity cut; two experts only.
        batch_prioritized: tokens queue by descending gate probability; two experts only.
        eval_capacity_token_fraction: capacity in evaluation, as a share of the tokens; <= 0: training rule.
        generation_capacity_token_fraction: the same for incremental decoding; None: nothing is dropped.
    """

    top_k: int = 2
    gating_use_fp32: bool = False
    second_expert_policy: SecondExpertPolicy = SecondExpertPolicy.SAMPLING
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    eval_capacity_token_fraction: float = 0.25
    generation_capacity_token_fraction: float | None = None


class BranchRule:
    """Route tokens with the gates of the moe branch, as a ``BranchConfig`` says.

    Capacity follows from a rank's own tokens, whose assignments alone it limits, also where other ranks have tokens of
    the same micro-batch (``shards``): there other assignments may be dropped than on one rank with all tokens.
    """

    def __init__(self, config: BranchConfig, *, shards: Shards | None = None) -> None:
        self.config = config
        self.shards = shards or LocalShards()

    def route(
        self,
        logits_TE: Tensor,
        tokens: TokenInfo,
        decision: RoutingDecision | None = None,
        *,
        bias_E: Tensor | None = None,
    ) -> RouterOutput:
        """See ``RoutingRule``; these gates know no expert bias."""
        if bias_E is not None:
            raise ValueError("the gates of the moe branch have no expert bias; use the top-k rule")
        gates_TE = gate_probabilities(logits_TE, use_fp32=self.config.gating_use_fp32)
        if decision is None or self._draws_random_numbers(tokens.mode):
            # A recomputed pass draws as well: the dropout that follows must see the same random numbers.
            taken = self._decide(logits_TE.to(gates_TE.dtype), gates_TE, tokens)
            if decision is None:
                micro_batch = sum_micro_batch(self.shards, taken, tokens.padding_T)
                decision = taken if micro_batch is None else replace(taken, micro_batch=micro_batch)
        weights_TK = combine_weights(
            gates_TE, decision, normalize_before_dropping=self.config.normalize_before_dropping
        )
        whole = decision.micro_batch
        first_E = (whole or decision).counts.first_choices()
        num_tokens = None if whole is None else whole.tokens_R.sum()
        return RouterOutput(
            gates_TE=gates_TE,
            weights_TK=weights_TK.to(logits_TE.dtype),
            decision=decision,
            losses={"balance": balance_loss(gates_TE, first_E, num_tokens=num_tokens)},
        )

    def set_num_updates(self, num_updates: int) -> None:
        """See ``RoutingRule``; nothing is scheduled."""

    def _draws_random_numbers(self, mode: RouterMode) -> bool:
        draws = self.config.second_expert_policy is not SecondExpertPolicy.ALL
        return draws and mode is RouterMode.TRAIN and self.config.top_k > 1

    def _decide(self, logits_TE: Tensor, gates_TE: Tensor, tokens: TokenInfo) -> RoutingDecision:
        capacity = self._capacity(gates_TE.shape[0], gates_TE.shape[1], tokens.mode)
        if self.config.top_k == 1:
            return decide_top1(gates_TE, capacity=capacity, padding_T=tokens.padding_T)
        return decide_top2(
            logits_TE,
            gates_TE,
            capacity=capacity,
            policy=self.config.second_expert_policy,
            training=tokens.mode is RouterMode.TRAIN,
            normalize_before_dropping=self.config.normalize_before_dropping,
            padding_T=tokens.padding_T,
            prioritized=self.config.batch_prioritized,
        )

    def _capacity(self, num_tokens: int, num_experts: int, mode: RouterMode) -> int | None:
        fraction = None
        if mode is RouterMode.EVAL:
            fraction = self.config.eval_capacity_token_fraction
        elif mode is RouterMode.GENERATE:
            fraction = self.config.generation_capacity_token_fraction
            if fraction is None:
                return None
        return capacity_of(num_tokens, num_experts, top_k=self.config.top_k, eval_token_fraction=fraction)
