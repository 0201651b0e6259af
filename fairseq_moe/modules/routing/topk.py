"""Token-choice routing of any K, and its relatives: expert choice, Sinkhorn, hashing and forced balance.

The order is Megatron's: scores, choice, capacity; the balance losses look at plain choices, without bias,
groups and drops. Deliberate differences are listed in ``docs/routing.md``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.routing import losses
from fairseq_moe.modules.routing.capacity import DropPolicy, expert_capacity, keep_within_capacity
from fairseq_moe.modules.routing.contract import RouterMode, RouterOutput, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.scores import (
    ScoreRule,
    choice_scores,
    normalized_scores,
    token_choice,
    weights_of_choice,
)
from fairseq_moe.modules.routing.sinkhorn import sinkhorn_plan

__all__ = ["CapacityConfig", "Choice", "TopKConfig", "TopKRule"]

# A multiplicative hash (Knuth, The Art of Computer Programming 3, 6.4) spreads neighbouring ids over the
# experts.
_HASH_MULTIPLIER = 2_654_435_761


class Choice(StrEnum):
    """Who chooses whom.

    ``token``: each token its K best experts. ``expert``: each expert its best T * K / E tokens (Zhou et al.
    2022, arXiv 2202.09368; not causal). ``sinkhorn``: tokens choose by a balanced plan while training.
    ``hash``: a token's experts follow from its vocabulary id (Roller et al. 2021). ``round_robin`` and
    ``random``: exact and expected balance, for benchmarks.
    """

    TOKEN = "token"
    EXPERT = "expert"
    SINKHORN = "sinkhorn"
    HASH = "hash"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many rows an expert takes.

    Args:
        factor: C = ceil(T * K / E * factor); None: no limit.
        minimum: C is at least this.
        policy: who is dropped.
        num_warmup_updates: the limit holds for so many updates and then no more; None: always.
        max_tokens: tokens of the largest training batch of any rank, which fixes the shapes of padded
            experts; None: not known.
    """

    factor: float | None = None
    minimum: int = 0
    policy: DropPolicy = DropPolicy.PROBS
    num_warmup_updates: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """How tokens are routed.

    Args:
        score: scores and weights.
        choice: who chooses whom.
        capacity: how many rows an expert takes.
        aux_losses: the balancing losses wanted: aux, seq_aux, global_aux, z.
    """

    score: ScoreRule
    choice: Choice = Choice.TOKEN
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    aux_losses: frozenset[str] = frozenset()

    @property
    def top_k(self) -> int:
        """K."""
        return self.score.top_k


class TopKRule:
    """See ``TopKConfig``.

    Args:
        config: the rule.
        bias_E: float32, moves choices and never weights; its owner sets the attribute before each pass.
        global_counts: choices of this micro-batch -> choices of all ranks in this update so far.
    """

    def __init__(
        self,
        config: TopKConfig,
        *,
        bias_E: Tensor | None = None,
        global_counts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.bias_E = bias_E
        self.global_counts = global_counts
        self.num_updates = 0

    def route(self, logits_TE: Tensor, tokens: TokenInfo, decision: RoutingDecision | None) -> RouterOutput:
        """See ``RoutingRule``."""
        dtype = logits_TE.dtype
        router_logits_TE = logits_TE
        if self.config.choice is Choice.RANDOM:
            logits_TE = _random_logits(logits_TE, tokens)
        compute_TE = logits_TE.to(torch.promote_types(dtype, torch.float32))
        gates_TE = normalized_scores(compute_TE, self.config.score.function)
        if decision is None:
            decision = self._decide(compute_TE, gates_TE.detach(), tokens)
        weights_TK = self._weights(compute_TE, decision.expert_ids_TK) * decision.kept_TK
        return RouterOutput(
            gates_TE=gates_TE,
            weights_TK=weights_TK.to(dtype),
            decision=decision,
            losses=self._losses(router_logits_TE, gates_TE, tokens, decision),
        )

    @torch.no_grad()
    def _decide(self, logits_TE: Tensor, gates_TE: Tensor, tokens: TokenInfo) -> RoutingDecision:
        ids_TK, wanted_TK = self._choose(logits_TE, tokens)
        num_tokens, num_experts = logits_TE.shape
        capacity = self.capacity(num_tokens, num_experts, tokens.mode)
        kept_TK = wanted_TK
        if capacity is not None:
            limit: int | Tensor = capacity
            if tokens.padding_T is not None:
                limit = self._valid_capacity(
                    tokens.padding_T, num_experts, factor=self.config.capacity.factor
                )
            kept_TK = keep_within_capacity(
                ids_TK,
                self._weights(logits_TE, ids_TK),
                wanted_TK,
                num_experts=num_experts,
                capacity=limit,
                policy=self.config.capacity.policy,
            )
        return RoutingDecision(
            expert_ids_TK=ids_TK,
            wanted_TK=wanted_TK,
            kept_TK=kept_TK,
            capacity=capacity,
            num_places=self._num_places(num_tokens, num_experts, capacity, tokens.mode),
            balance_counts_2E=self._balance_counts(gates_TE, tokens),
        )

    # --- choice ---

    def _choose(self, logits_TE: Tensor, tokens: TokenInfo) -> tuple[Tensor, Tensor]:
        """Experts of each token, int64 (T, K), and which of them are wanted, bool (T, K)."""
        choice, top_k = self.config.choice, self.config.top_k
        num_tokens, num_experts = logits_TE.shape
        if choice is Choice.EXPERT and tokens.mode is not RouterMode.GENERATE:
            return self._experts_choose(logits_TE, tokens)
        if choice is Choice.SINKHORN and tokens.mode is RouterMode.TRAIN:
            ids_TK = token_choice(sinkhorn_plan(logits_TE, padding_T=tokens.padding_T), top_k)
        elif choice in (Choice.HASH, Choice.ROUND_ROBIN):
            ids_TK = _fixed_choice(choice, tokens, num_tokens, num_experts, top_k, logits_TE.device)
        else:
            ids_TK = token_choice(choice_scores(logits_TE, self.config.score, bias_E=self.bias_E), top_k)
        wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if tokens.padding_T is not None:
            wanted_TK = wanted_TK & ~tokens.padding_T.unsqueeze(-1)
        return ids_TK, wanted_TK

    def _experts_choose(self, logits_TE: Tensor, tokens: TokenInfo) -> tuple[Tensor, Tensor]:
        """Every token lists every expert, its favourite first; wanted are those that chose it."""
        num_tokens, num_experts = logits_TE.shape
        places = min(self._expert_places(num_tokens, num_experts), num_tokens)
        scores_TE = normalized_scores(logits_TE, self.config.score.function)
        wanted_CE = torch.ones((places, num_experts), dtype=torch.bool, device=logits_TE.device)
        if tokens.padding_T is not None:
            scores_TE = scores_TE.masked_fill(tokens.padding_T.unsqueeze(-1), float("-inf"))
            valid_places = self._valid_capacity(tokens.padding_T, num_experts, factor=self._expert_factor)
            order_C1 = torch.arange(places, device=logits_TE.device).unsqueeze(-1)
            wanted_CE = wanted_CE & (order_C1 < torch.minimum(valid_places, (~tokens.padding_T).sum()))
        chosen_CE = scores_TE.topk(places, dim=0).indices
        wanted_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, chosen_CE, wanted_CE)
        ids_TE = scores_TE.argsort(dim=-1, descending=True)
        return ids_TE, wanted_TE.gather(-1, ids_TE)

    # --- weights ---

    def _weights(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        rule, choice = self.config.score, self.config.choice
        if choice is Choice.EXPERT:
            return normalized_scores(logits_TE, rule.function).gather(-1, ids_TK) * rule.scaling_factor
        if choice is Choice.SINKHORN:
            full_TE = torch.sigmoid(logits_TE) if rule.top_k == 1 else F.softmax(logits_TE, dim=-1)
            return full_TE.gather(-1, ids_TK)
        return weights_of_choice(logits_TE, ids_TK, rule)

    # --- capacity ---

    def _capacity(self, num_tokens: int, num_experts: int, *, factor: float) -> int:
        return expert_capacity(
            num_tokens,
            num_experts,
            top_k=self.config.top_k,
            factor=factor,
            minimum=self.config.capacity.minimum,
        )

    def _valid_capacity(self, padding_T: Tensor, num_experts: int, *, factor: float | None) -> Tensor:
        """Compute the capacity that the tokens alone would give, so that padding changes nothing.

        A tensor, because the number of tokens is known on the device only; shapes follow from ``capacity``.
        """
        assert factor is not None
        even_share = ((~padding_T).sum() * self.config.top_k).double() / num_experts
        return (even_share * factor).ceil().clamp(min=self.config.capacity.minimum)

    @property
    def _expert_factor(self) -> float:
        """Share of their even load that experts choose."""
        factor = self.config.capacity.factor
        return 1.0 if factor is None else factor

    def _expert_places(self, num_tokens: int, num_experts: int) -> int:
        return self._capacity(num_tokens, num_experts, factor=self._expert_factor)

    def _num_places(
        self, num_tokens: int, num_experts: int, capacity: int | None, mode: RouterMode
    ) -> int | None:
        max_tokens = self.config.capacity.max_tokens
        if capacity is None or max_tokens is None or mode is not RouterMode.TRAIN:
            return None
        if num_tokens > max_tokens:
            # Ranks whose batches fit would exchange other sizes than this one.
            raise ValueError(
                f"a training batch has {num_tokens} tokens, but experts are padded for at most {max_tokens} "
                "(--batch-size times the longest sequence); raise --batch-size to what batches hold."
            )
        return self.capacity(max_tokens, num_experts, mode)

    def capacity(self, num_tokens: int, num_experts: int, mode: RouterMode) -> int | None:
        """Rows that an expert takes from this rank; None: no limit."""
        config = self.config.capacity
        ended = config.num_warmup_updates is not None and self.num_updates >= config.num_warmup_updates
        if config.factor is None or ended or mode is RouterMode.GENERATE:
            return None
        return self._capacity(num_tokens, num_experts, factor=config.factor)

    # --- losses ---

    def _balance_counts(self, gates_TE: Tensor, tokens: TokenInfo) -> Tensor | None:
        wanted = self.config.aux_losses
        if not wanted & {"aux", "global_aux"}:
            return None
        counts_E = losses.choice_counts(gates_TE, top_k=self.config.top_k, padding_T=tokens.padding_T)
        if "global_aux" not in wanted or self.global_counts is None or tokens.mode is not RouterMode.TRAIN:
            return counts_E.expand(2, -1)
        return torch.stack([counts_E, self.global_counts(counts_E)])

    def _losses(
        self, logits_TE: Tensor, gates_TE: Tensor, tokens: TokenInfo, decision: RoutingDecision
    ) -> dict[str, Tensor]:
        wanted, padding_T = self.config.aux_losses, tokens.padding_T
        found = {}
        if decision.balance_counts_2E is not None:
            for name, counts_E in zip(("aux", "global_aux"), decision.balance_counts_2E, strict=True):
                if name in wanted:
                    found[name] = losses.load_balancing_loss(gates_TE, counts_E, padding_T=padding_T)
        if "seq_aux" in wanted:
            found["seq_aux"] = losses.sequence_balancing_loss(
                gates_TE, num_sequences=tokens.num_sequences, top_k=self.config.top_k, padding_T=padding_T
            )
        if "z" in wanted:
            found["z"] = losses.z_loss(logits_TE, padding_T=padding_T)
        return found


def _random_logits(logits_TE: Tensor, tokens: TokenInfo) -> Tensor:
    """Standard normal logits; gradients pass through to the real ones."""
    if tokens.mode is not RouterMode.TRAIN:
        return logits_TE
    return logits_TE + (torch.randn_like(logits_TE) - logits_TE).detach()


def _fixed_choice(
    choice: Choice, tokens: TokenInfo, num_tokens: int, num_experts: int, top_k: int, device: torch.device
) -> Tensor:
    """Experts that do not depend on scores: int64 (T, K), K different ones per token."""
    choices_K = torch.arange(top_k, device=device)
    if choice is Choice.ROUND_ROBIN:
        first_T = torch.arange(num_tokens, device=device) * top_k
        if tokens.padding_T is not None:
            first_T = ((~tokens.padding_T).cumsum(0) - 1) * top_k
    else:
        assert tokens.ids_T is not None
        first_T = (tokens.ids_T + 1) * _HASH_MULTIPLIER % (1 << 32) * num_experts >> 32
    return (first_T.unsqueeze(-1) + choices_K) % num_experts
