"""Route by the K best experts of each token, or by a relative: expert choice, Sinkhorn, hashing, forced balance.

The order is Megatron's: scores, choice, capacity; the balance losses look at plain choices, without bias,
groups and drops. Deliberate differences are listed in ``docs/routing.md``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.routing import losses
from fairseq_moe.modules.routing.capacity import DropPolicy, expert_capacity, keep_within_capacity
from fairseq_moe.modules.routing.choice import Choice, fixed_choice, random_logits
from fairseq_moe.modules.routing.contract import RouterMode, RouterOutput, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.scores import (
    ScoreFunction,
    ScoreRule,
    choice_scores,
    normalized_scores,
    token_choice,
    weights_of_choice,
)
from fairseq_moe.modules.routing.sinkhorn import sinkhorn_plan

__all__ = ["CapacityConfig", "Choice", "TopKConfig", "TopKRule"]


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


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """Configure how a ``TopKRule`` routes.

    Args:
        score: scores and weights.
        choice: who chooses whom.
        capacity: limit of the assignments that an expert takes.
        aux_losses: the balancing losses to compute: aux, seq_aux, global_aux, z.
    """

    score: ScoreRule
    choice: Choice = Choice.TOKEN
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    aux_losses: frozenset[str] = frozenset()

    @property
    def top_k(self) -> int:
        """Number of experts that each token chooses: K."""
        return self.score.top_k


class TopKRule:
    """Route tokens as a ``TopKConfig`` says.

    Args:
        config: the rule.
        global_counts: choices of this micro-batch -> choices of all ranks in this update so far.
    """

    def __init__(
        self,
        config: TopKConfig,
        *,
        global_counts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.global_counts = global_counts
        self.num_updates = 0

    def set_num_updates(self, num_updates: int) -> None:
        """See ``RoutingRule``: the capacity may hold for the first updates only."""
        self.num_updates = num_updates

    def route(
        self,
        logits_TE: Tensor,
        tokens: TokenInfo,
        decision: RoutingDecision | None = None,
        *,
        bias_E: Tensor | None = None,
    ) -> RouterOutput:
        """Route tokens; see ``RoutingRule``."""
        dtype = logits_TE.dtype
        router_logits_TE = logits_TE
        if self.config.choice is Choice.RANDOM:
            logits_TE = random_logits(logits_TE, tokens)
        compute_TE = logits_TE.to(torch.promote_types(dtype, torch.float32))
        gates_TE = normalized_scores(compute_TE, self.config.score.function)
        if decision is None:
            decision = self._decide(compute_TE, gates_TE.detach(), tokens, bias_E)
        weights_TK = self._weights(compute_TE, decision.expert_ids_TK) * decision.kept_TK
        return RouterOutput(
            gates_TE=gates_TE,
            weights_TK=weights_TK.to(dtype),
            decision=decision,
            losses=self._losses(
                router_logits_TE, gates_TE, tokens, decision, is_plain=self._chooses_plainly(bias_E)
            ),
        )

    @torch.no_grad()
    def _decide(
        self, logits_TE: Tensor, gates_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None
    ) -> RoutingDecision:
        ids_TK, requested_TK = self._choose(logits_TE, tokens, bias_E)
        num_tokens, num_experts = logits_TE.shape
        capacity = self.capacity(num_tokens, num_experts, tokens.mode)
        kept_TK = requested_TK
        if capacity is not None:
            limit: int | Tensor = capacity
            if tokens.padding_T is not None:
                limit = self._valid_capacity(
                    tokens.padding_T, num_experts, factor=self.config.capacity.factor
                )
            kept_TK = keep_within_capacity(
                ids_TK,
                self._weights(logits_TE, ids_TK),
                requested_TK,
                num_experts=num_experts,
                capacity=limit,
                policy=self.config.capacity.policy,
            )
        decision = RoutingDecision.counted(
            expert_ids_TK=ids_TK,
            requested_TK=requested_TK,
            kept_TK=kept_TK,
            num_experts=num_experts,
            capacity=capacity,
            num_slots=self._num_slots(num_tokens, num_experts, capacity, tokens.mode),
            keeps_all=capacity is None
            and tokens.padding_T is None
            and self.config.choice is not Choice.EXPERT,
            padding_T=tokens.padding_T,
        )
        is_plain = self._chooses_plainly(bias_E)
        balance_counts_2E = self._balance_counts(gates_TE, decision, tokens, is_plain=is_plain)
        return replace(decision, balance_counts_2E=balance_counts_2E)

    # --- choice ---

    def _choose(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token, int64 (T, K), and say which are requested, bool (T, K)."""
        choice, top_k = self.config.choice, self.config.top_k
        num_tokens, num_experts = logits_TE.shape
        if choice is Choice.EXPERT and tokens.mode is not RouterMode.GENERATE:
            return self._experts_choose(logits_TE, tokens)
        if choice is Choice.SINKHORN and tokens.mode is RouterMode.TRAIN:
            ids_TK = token_choice(sinkhorn_plan(logits_TE, padding_T=tokens.padding_T), top_k)
        elif choice in (Choice.HASH, Choice.ROUND_ROBIN):
            ids_TK = fixed_choice(choice, tokens, num_tokens, num_experts, top_k, logits_TE.device)
        else:
            ids_TK = token_choice(choice_scores(logits_TE, self.config.score, bias_E=bias_E), top_k)
        requested_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if tokens.padding_T is not None:
            requested_TK = requested_TK & ~tokens.padding_T.unsqueeze(-1)
        return ids_TK, requested_TK

    def _experts_choose(self, logits_TE: Tensor, tokens: TokenInfo) -> tuple[Tensor, Tensor]:
        """List every expert for every token, its favourite first; requested are those that chose it."""
        num_tokens, num_experts = logits_TE.shape
        num_slots = min(self._expert_slots(num_tokens, num_experts), num_tokens)
        scores_TE = normalized_scores(logits_TE, self.config.score.function)
        requested_CE = torch.ones((num_slots, num_experts), dtype=torch.bool, device=logits_TE.device)
        if tokens.padding_T is not None:
            scores_TE = scores_TE.masked_fill(tokens.padding_T.unsqueeze(-1), float("-inf"))
            valid_slots = self._valid_capacity(tokens.padding_T, num_experts, factor=self._expert_factor)
            order_C1 = torch.arange(num_slots, device=logits_TE.device).unsqueeze(-1)
            requested_CE = requested_CE & (order_C1 < torch.minimum(valid_slots, (~tokens.padding_T).sum()))
        chosen_CE = scores_TE.topk(num_slots, dim=0).indices
        requested_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, chosen_CE, requested_CE)
        ids_TE = scores_TE.argsort(dim=-1, descending=True)
        return ids_TE, requested_TE.gather(-1, ids_TE)

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
        """Number of tokens that an expert chooses, as a share of the even load."""
        factor = self.config.capacity.factor
        return 1.0 if factor is None else factor

    def _expert_slots(self, num_tokens: int, num_experts: int) -> int:
        return self._capacity(num_tokens, num_experts, factor=self._expert_factor)

    def _num_slots(
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
        """Compute the capacity: assignments that an expert takes from this rank; None: no limit."""
        config = self.config.capacity
        ended = config.num_warmup_updates is not None and self.num_updates >= config.num_warmup_updates
        if config.factor is None or ended or mode is RouterMode.GENERATE:
            return None
        return self._capacity(num_tokens, num_experts, factor=config.factor)

    # --- losses ---

    def _chooses_plainly(self, bias_E: Tensor | None) -> bool:
        """Whether experts are chosen by the scores that the balance losses go by, so that one choice does for both."""
        score = self.config.score
        return (
            self.config.choice in (Choice.TOKEN, Choice.RANDOM)
            and score.function is ScoreFunction.SOFTMAX
            and score.num_groups is None
            and bias_E is None
        )

    def _balance_counts(
        self, gates_TE: Tensor, decision: RoutingDecision, tokens: TokenInfo, *, is_plain: bool
    ) -> Tensor | None:
        asked = self.config.aux_losses
        if not asked & {"aux", "global_aux"}:
            return None
        if is_plain:
            counts_E = decision.counts.requested_E
        else:
            counts_E = losses.choice_counts(gates_TE, top_k=self.config.top_k, padding_T=tokens.padding_T)
        if "global_aux" not in asked or self.global_counts is None or tokens.mode is not RouterMode.TRAIN:
            return counts_E.expand(2, -1)
        return torch.stack([counts_E, self.global_counts(counts_E)])

    def _losses(
        self,
        logits_TE: Tensor,
        gates_TE: Tensor,
        tokens: TokenInfo,
        decision: RoutingDecision,
        *,
        is_plain: bool,
    ) -> dict[str, Tensor]:
        asked, padding_T = self.config.aux_losses, tokens.padding_T
        found = {}
        if decision.balance_counts_2E is not None:
            for name, counts_E in zip(("aux", "global_aux"), decision.balance_counts_2E, strict=True):
                if name in asked:
                    found[name] = losses.load_balancing_loss(gates_TE, counts_E, padding_T=padding_T)
        if "seq_aux" in asked:
            ids_TK = decision.expert_ids_TK
            if not is_plain:
                ids_TK = token_choice(gates_TE.detach(), self.config.top_k)
            found["seq_aux"] = losses.sequence_balancing_loss(
                gates_TE, ids_TK, num_sequences=tokens.num_sequences, padding_T=padding_T
            )
        if "z" in asked:
            found["z"] = losses.z_loss(logits_TE, padding_T=padding_T)
        return found
