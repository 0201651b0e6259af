"""Join the routing of ranks that have other tokens of the same micro-batch: its counts, and its scores.

Products are made of sums over all tokens, so counts are summed first, and averaged never: the mean of what single ranks
find is another number. One collective for each decision carries all counts of a layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.routing.contract import (
    AssignmentCounts,
    MicroBatch,
    RoutingDecision,
    SequenceCounts,
    TokenInfo,
    count_ids,
)
from fairseq_moe.modules.shards import Shards

__all__ = ["count_sequences", "gather_scores", "sum_micro_batch"]


@torch.no_grad()
def count_sequences(expert_ids_TK: Tensor, tokens: TokenInfo, *, num_experts: int) -> SequenceCounts:
    """Count the choices and the tokens of each sequence, padding left out.

    Args:
        expert_ids_TK: int64, experts that tokens choose.
        tokens: which of them are padding, and what sequences they form.
        num_experts: E.
    """
    num_tokens, top_k = expert_ids_TK.shape
    num_sequences = tokens.num_sequences
    numbers_B = torch.arange(num_sequences, device=expert_ids_TK.device)
    sequence_T = numbers_B.repeat_interleave(num_tokens // num_sequences)
    bins_TK = sequence_T.unsqueeze(-1) * num_experts + expert_ids_TK
    valid_T = None if tokens.padding_T is None else ~tokens.padding_T
    counted = None if valid_T is None else valid_T.repeat_interleave(top_k)
    choices = count_ids(bins_TK.reshape(-1), size=num_sequences * num_experts, counted=counted)
    return SequenceCounts(
        choices_BE=choices.view(num_sequences, num_experts),
        tokens_B=count_ids(sequence_T, size=num_sequences, counted=valid_T),
    )


@torch.no_grad()
def sum_micro_batch(
    shards: Shards,
    decision: RoutingDecision,
    padding_T: Tensor | None,
    *,
    plain_choices_E: Tensor | None = None,
    sequences: SequenceCounts | None = None,
) -> MicroBatch | None:
    """Sum what was counted here over all ranks of the micro-batch, in one collective; None: the tokens here are all.

    Args:
        shards: joins the ranks of the micro-batch.
        decision: about the tokens here.
        padding_T: bool, those of them that are padding.
        plain_choices_E: int64, choices here that a balance loss goes by, where the decision's are others.
        sequences: counted here; what ranks have of a sequence is added up.
    """
    num_ranks = shards.context * shards.tensor
    if num_ranks == 1:
        return None
    histogram_34E = decision.counts.histogram_34E
    num_tokens = len(decision.expert_ids_TK)
    tokens_R = histogram_34E.new_zeros(num_ranks)
    tokens_R[shards.context_index * shards.tensor + shards.tensor_index] = num_tokens
    num_valid = histogram_34E.new_full((), num_tokens) if padding_T is None else (~padding_T).sum()
    parts = [histogram_34E, tokens_R, num_valid]
    parts += [] if plain_choices_E is None else [plain_choices_E]
    parts += [] if sequences is None else list(sequences)
    summed = shards.sum_counts(torch.cat([part.reshape(-1) for part in parts]))
    pieces = summed.split([part.numel() for part in parts])
    wholes = iter([piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)])
    return MicroBatch(
        counts=AssignmentCounts.of(next(wholes)),
        tokens_R=next(wholes),
        num_valid=next(wholes),
        plain_choices_E=None if plain_choices_E is None else next(wholes),
        sequences=None if sequences is None else SequenceCounts(next(wholes), next(wholes)),
    )


@torch.no_grad()
def gather_scores(
    shards: Shards, scores_TE: Tensor, padding_T: Tensor | None, micro_batch: MicroBatch
) -> tuple[Tensor, Tensor]:
    """Gather the scores of all tokens of the micro-batch, in any order, and mark the rows that are no token.

    Ranks have different numbers of tokens, so each sends as many rows as the largest of them has. The host waits for
    that number, which all ranks know alike from the sum of their counts.

    Args:
        shards: joins the ranks of the micro-batch.
        scores_TE: float, of the tokens here.
        padding_T: bool, those of them that are padding.
        micro_batch: counts of all ranks.

    Returns:
        The scores and, bool, which of the rows are padding.
    """
    num_tokens = len(scores_TE)
    num_rows = max(int(micro_batch.tokens_R.max()), 1)
    if padding_T is None:
        padding_T = scores_TE.new_zeros(num_tokens, dtype=torch.bool)
    marked = torch.cat([scores_TE, padding_T.unsqueeze(-1).to(scores_TE.dtype)], dim=-1)
    gathered = shards.gather_tokens(F.pad(marked, (0, 0, 0, num_rows - num_tokens), value=1.0))
    return gathered[:, :-1], gathered[:, -1] > 0
