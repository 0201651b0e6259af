"""Count the choices that the balance losses of the top-k family go by, and compute those losses.

They go by plain choices, without bias, groups and drops, of all tokens of the micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq_moe.modules.routing.contract import RouterMode, RoutingDecision, TokenInfo
from fairseq_moe.modules.routing.losses import auxiliary_losses, choice_counts
from fairseq_moe.modules.routing.micro_batch import count_sequences, sum_micro_batch
from fairseq_moe.modules.routing.scores import token_choice
from fairseq_moe.modules.shards import Shards

__all__ = ["Balancing"]


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """Compute the balance losses of a rule, each a share where tokens of the micro-batch are on other ranks.

    Args:
        asked: the losses to compute: aux, seq_aux, global_aux, z.
        top_k: K.
        shards: joins the ranks of a micro-batch.
        global_counts: choices of these tokens -> choices of all ranks in this update so far.
    """

    asked: frozenset[str]
    top_k: int
    shards: Shards
    global_counts: Callable[[Tensor], Tensor] | None

    @torch.no_grad()
    def counted(
        self, decision: RoutingDecision, gates_TE: Tensor, tokens: TokenInfo, *, plainly: bool
    ) -> RoutingDecision:
        """Add the counts of all ranks of the micro-batch, and the choices that the losses go by, to a new decision.

        Args:
            decision: just taken.
            gates_TE: float, normalised scores.
            tokens: about the tokens.
            plainly: the decision's choices are those that the losses go by.
        """
        own_E: Tensor | None = None
        if self.asked & {"aux", "global_aux"}:
            own_E = decision.counts.requested_E
            if not plainly:
                own_E = choice_counts(gates_TE, top_k=self.top_k, padding_T=tokens.padding_T)
        decision = self._with_micro_batch(decision, gates_TE, tokens, own_E, plainly=plainly)
        if own_E is None:
            return decision
        whole_E, micro_batch = own_E, decision.micro_batch
        if micro_batch is not None:
            plain_E = micro_batch.plain_choices_E
            whole_E = micro_batch.counts.requested_E if plain_E is None else plain_E
        if (
            "global_aux" not in self.asked
            or self.global_counts is None
            or tokens.mode is not RouterMode.TRAIN
        ):
            return replace(decision, balance_counts_2E=whole_E.expand(2, -1))
        # All ranks are those of the micro-batch, too: each adds its own.
        return replace(decision, balance_counts_2E=torch.stack([whole_E, self.global_counts(own_E)]))

    def _with_micro_batch(
        self,
        decision: RoutingDecision,
        gates_TE: Tensor,
        tokens: TokenInfo,
        own_E: Tensor | None,
        *,
        plainly: bool,
    ) -> RoutingDecision:
        if self.shards.context * self.shards.tensor == 1:
            return decision
        sequences = None
        if "seq_aux" in self.asked:
            ids_TK = self._choices(decision, gates_TE, plainly=plainly)
            sequences = count_sequences(ids_TK, tokens, num_experts=gates_TE.shape[-1])
        micro_batch = sum_micro_batch(
            self.shards,
            decision,
            tokens.padding_T,
            plain_choices_E=None if plainly else own_E,
            sequences=sequences,
        )
        return replace(decision, micro_batch=micro_batch)

    def losses(
        self,
        logits_TE: Tensor,
        gates_TE: Tensor,
        tokens: TokenInfo,
        decision: RoutingDecision,
        *,
        plainly: bool,
    ) -> dict[str, Tensor]:
        """Compute the losses that are asked for of a decision that ``counted`` has returned."""
        ids_TK = decision.expert_ids_TK
        if "seq_aux" in self.asked:
            ids_TK = self._choices(decision, gates_TE.detach(), plainly=plainly)
        return auxiliary_losses(
            self.asked,
            logits_TE,
            gates_TE,
            tokens,
            ids_TK=ids_TK,
            counts_2E=decision.balance_counts_2E,
            micro_batch=decision.micro_batch,
        )

    def _choices(self, decision: RoutingDecision, gates_TE: Tensor, *, plainly: bool) -> Tensor:
        return decision.expert_ids_TK if plainly else token_choice(gates_TE, self.top_k)
