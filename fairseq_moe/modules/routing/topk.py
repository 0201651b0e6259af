"""Route by the K best experts of each token, or by a relative: expert choice, Sinkhorn, hashing, forced balance.

The order is Megatron's: scores, choice, capacity; the balance losses look at plain choices, without bias,
groups and drops. Deliberate differences are listed in ``docs/routing.md``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused.sinkhorn import sinkhorn_plan
from fairseq_moe.modules.routing.balancing import Balancing
from fairseq_moe.modules.routing.capacity import CapacityConfig, expert_capacity, keep_within_capacity
from fairseq_moe.modules.routing.choice import Choice, fixed_choice, random_logits
from fairseq_moe.modules.routing.contract import RouterMode, RouterOutput, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.one_kernel import fits_one_kernel, route_in_one_kernel
from fairseq_moe.modules.routing.scores import (
    ScoreFunction,
    ScoreRule,
    choice_scores,
    normalized_scores,
    token_choice,
    weights_of_choice,
)
from fairseq_moe.modules.shards import LocalShards, Shards

__all__ = ["CapacityConfig", "Choice", "TopKConfig", "TopKRule"]


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
        global_counts: choices of these tokens -> choices of all ranks in this update so far.
        shards: joins the ranks that have tokens of the same micro-batch; None: this rank has all.
    """

    def __init__(
        self,
        config: TopKConfig,
        *,
        global_counts: Callable[[Tensor], Tensor] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.config = config
        self.global_counts = global_counts
        self.shards = shards or LocalShards()
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
        if self._runs_in_one_kernel(logits_TE, tokens, decision):
            return self._route_in_one_kernel(logits_TE, tokens, decision, bias_E)
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
            losses=self._balancing.losses(
                router_logits_TE, gates_TE, tokens, decision, plainly=self._chooses_plainly(bias_E)
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
            padding_T=tokens.padding_T,
        )
        return self._balancing.counted(decision, gates_TE, tokens, plainly=self._chooses_plainly(bias_E))

    def _runs_in_one_kernel(
        self, logits_TE: Tensor, tokens: TokenInfo, decision: RoutingDecision | None
    ) -> bool:
        """Whether each token chooses by its scores alone, nothing is dropped, and the logits are on a GPU."""
        num_tokens, num_experts = logits_TE.shape
        capacity = decision.capacity if decision else self.capacity(num_tokens, num_experts, tokens.mode)
        chooses_freely = self.config.choice is Choice.TOKEN and capacity is None
        return chooses_freely and fits_one_kernel(logits_TE, self.config.score)

    def _route_in_one_kernel(
        self,
        logits_TE: Tensor,
        tokens: TokenInfo,
        decision: RoutingDecision | None,
        bias_E: Tensor | None,
    ) -> RouterOutput:
        routed = route_in_one_kernel(logits_TE, self.config.score, tokens, decision, bias_E=bias_E)
        plainly = self._chooses_plainly(bias_E)
        if decision is None:
            gates_TE = routed.gates_TE.detach()
            decision = self._balancing.counted(routed.decision, gates_TE, tokens, plainly=plainly)
        found = self._balancing.losses(logits_TE, routed.gates_TE, tokens, decision, plainly=plainly)
        return routed._replace(decision=decision, losses=found)

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
        # Logits of half precision are often equal. A GPU's plain sort puts equal scores in any order, and so would say
        # other first and second choices than a CPU, whose sort keeps their order (of up to 16 experts).
        ids_TE = scores_TE.argsort(dim=-1, descending=True, stable=scores_TE.is_cuda)
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

    @property
    def _balancing(self) -> Balancing:
        config = self.config
        return Balancing(
            asked=config.aux_losses,
            top_k=config.top_k,
            shards=self.shards,
            global_counts=self.global_counts,
        )

    def _chooses_plainly(self, bias_E: Tensor | None) -> bool:
        """Whether experts are chosen by the scores that the balance losses go by, so that one choice does for both."""
        score = self.config.score
        return (
            self.config.choice in (Choice.TOKEN, Choice.RANDOM)
            and score.function is ScoreFunction.SOFTMAX
            and score.num_groups is None
            and bias_E is None
        )
