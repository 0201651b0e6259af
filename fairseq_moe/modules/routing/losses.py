"""Compute the auxiliary losses of routing: pure functions, unscaled; the criterion weighs and adds them.

Counts are arguments, so those of parts of a micro-batch, or of other ranks, can be added before a loss is made of them.
Where other ranks have tokens of the same micro-batch, a loss is this rank's *share*: own sums of what has a gradient,
over counts and numbers of tokens of all. Shares add up to the loss of one rank with all tokens, in value and gradient.

The load-balancing losses share one formula, E * sum_e(share of the choices that fell on e * mean score of
e), which is 1 when every expert is chosen equally often, whatever the scores (Switch Transformer, arXiv
2101.03961, equation 4). They differ in whose choices are counted. Gradients flow through the scores only.
"""

import torch
from torch import Tensor

from fairseq_moe.modules.routing.contract import MicroBatch, SequenceCounts, TokenInfo, count_ids
from fairseq_moe.modules.routing.scores import token_choice

__all__ = [
    "auxiliary_losses",
    "balance_loss",
    "choice_counts",
    "load_balancing_loss",
    "sequence_balancing_loss",
    "z_loss",
]


def auxiliary_losses(
    asked: frozenset[str],
    logits_TE: Tensor,
    gates_TE: Tensor,
    tokens: TokenInfo,
    *,
    ids_TK: Tensor,
    counts_2E: Tensor | None,
    micro_batch: MicroBatch | None = None,
) -> dict[str, Tensor]:
    """Compute the losses that are asked for, of aux, seq_aux, global_aux and z.

    Args:
        asked: their names.
        logits_TE: float router logits.
        gates_TE: float, normalised scores.
        tokens: which of them are padding, and what sequences they form.
        ids_TK: int64, each token's K best experts by these scores.
        counts_2E: see ``RoutingDecision.balance_counts_2E``.
        micro_batch: counts of all ranks that have tokens of this micro-batch; None: the tokens here are all.
    """
    padding_T = tokens.padding_T
    num_tokens = None if micro_batch is None else micro_batch.num_valid
    found = {}
    if counts_2E is not None:
        for name, counts_E in zip(("aux", "global_aux"), counts_2E, strict=True):
            if name in asked:
                found[name] = load_balancing_loss(
                    gates_TE, counts_E, padding_T=padding_T, num_tokens=num_tokens
                )
    if "seq_aux" in asked:
        found["seq_aux"] = sequence_balancing_loss(
            gates_TE,
            ids_TK,
            num_sequences=tokens.num_sequences,
            padding_T=padding_T,
            whole=None if micro_batch is None else micro_batch.sequences,
        )
    if "z" in asked:
        found["z"] = z_loss(logits_TE, padding_T=padding_T, num_tokens=num_tokens)
    return found


def balance_loss(gates_TE: Tensor, first_choices_E: Tensor, *, num_tokens: Tensor | None = None) -> Tensor:
    """Compute the load-balancing loss of GShard (Lepikhin et al. 2020, equation 4) times E.

    E * sum_e( mean_t gates[t, e] * share of tokens whose first choice is e ), counted before the capacity
    cut; 1 when probabilities and choices are uniform. The gradient flows through the probabilities only.
    Padding tokens count in both means' denominators and in the first mean, as in fairseq's moe branch, but
    make no choice.

    Args:
        gates_TE: float gate probabilities.
        first_choices_E: int64, requested first choices of each expert, of all tokens of the micro-batch.
        num_tokens: of the whole micro-batch; None: those here.

    Returns:
        float32 (or float64) scalar; 0 without tokens.
    """
    num_experts = gates_TE.shape[-1]
    gates_TE = _at_least_fp32(gates_TE)
    denominator = max(len(gates_TE), 1) if num_tokens is None else num_tokens.clamp(min=1)
    share_E = first_choices_E.to(gates_TE.dtype) / denominator
    mean_E = gates_TE.sum(dim=0) / denominator
    return num_experts * (mean_E * share_E).sum()


@torch.no_grad()
def choice_counts(scores_TE: Tensor, *, top_k: int, padding_T: Tensor | None = None) -> Tensor:
    """Count how often an expert is among the K best by plain scores, without bias, groups or drops: int64 (E,)."""
    ids_TK = token_choice(scores_TE, top_k)
    counted = None if padding_T is None else ~padding_T.repeat_interleave(top_k)
    return count_ids(ids_TK.reshape(-1), size=scores_TE.shape[-1], counted=counted)


def load_balancing_loss(
    scores_TE: Tensor, counts_E: Tensor, *, padding_T: Tensor | None = None, num_tokens: Tensor | None = None
) -> Tensor:
    """Compute E * sum_e( counts[e] / sum(counts) * mean over valid tokens of scores[t, e] ).

    Args:
        scores_TE: float, normalised over the experts.
        counts_E: choices, of these tokens or of more (earlier micro-batches, other ranks).
        padding_T: bool, True where a token is padding.
        num_tokens: divisor of the mean, the valid tokens of the whole micro-batch; None: those here.

    Returns:
        float32 (or float64) scalar; 0 without tokens.
    """
    scores_TE = _at_least_fp32(scores_TE)
    total_E, valid = _valid_sum(scores_TE, padding_T)
    mean_E = total_E / (valid if num_tokens is None else num_tokens).clamp(min=1)
    share_E = counts_E.to(scores_TE.dtype) / counts_E.sum().clamp(min=1)
    return scores_TE.shape[-1] * (share_E * mean_E).sum()


def sequence_balancing_loss(
    scores_TE: Tensor,
    expert_ids_TK: Tensor,
    *,
    num_sequences: int,
    padding_T: Tensor | None = None,
    whole: SequenceCounts | None = None,
) -> Tensor:
    """Compute the loss of each sequence (DeepSeek-V2, arXiv 2405.04434, equation 23), averaged by valid tokens.

    Args:
        scores_TE: float, normalised over the experts; tokens batch-major.
        expert_ids_TK: int64, each token's K best experts by these scores.
        num_sequences: B, sequences of equal length.
        padding_T: bool, True where a token is padding.
        whole: counts of the whole sequences, of which the tokens here are a part; None: they are all.

    Returns:
        float32 (or float64) scalar; with sequences of equally many tokens their plain mean.
    """
    num_experts = scores_TE.shape[-1]
    scores_BSE = _at_least_fp32(scores_TE).reshape(num_sequences, -1, num_experts)
    valid_BS = torch.ones_like(scores_BSE[..., 0])
    if padding_T is not None:
        valid_BS = valid_BS * ~padding_T.view(num_sequences, -1)
    top_k = expert_ids_TK.shape[-1]
    ids_BSK = expert_ids_TK.reshape(num_sequences, -1, top_k)
    if whole is None:
        with torch.no_grad():
            chosen_BSE = torch.zeros_like(scores_BSE).scatter(-1, ids_BSK, 1.0) * valid_BS.unsqueeze(-1)
        chosen_BE, tokens_B = chosen_BSE.sum(1), valid_BS.sum(-1)
    else:
        chosen_BE, tokens_B = (counts.to(scores_BSE.dtype) for counts in whole)
    share_BE = chosen_BE / (top_k * tokens_B.unsqueeze(-1)).clamp(min=1)
    mean_BE = (scores_BSE * valid_BS.unsqueeze(-1)).sum(1) / tokens_B.unsqueeze(-1).clamp(min=1)
    losses_B = num_experts * (share_BE * mean_BE).sum(-1)
    return (losses_B * tokens_B).sum() / tokens_B.sum().clamp(min=1)


def z_loss(logits_TE: Tensor, *, padding_T: Tensor | None = None, num_tokens: Tensor | None = None) -> Tensor:
    """Average logsumexp(logits)^2 over valid tokens (ST-MoE, arXiv 2202.08906, equation 5): float scalar.

    ``num_tokens`` divides, if given: the valid tokens of the whole micro-batch.
    """
    squares_T = torch.logsumexp(_at_least_fp32(logits_TE), dim=-1).square()
    total, valid = _valid_sum(squares_T, padding_T)
    return total / (valid if num_tokens is None else num_tokens).clamp(min=1)


def _valid_sum(values_T: Tensor, padding_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over the tokens that are not padding, and count them."""
    if padding_T is None:
        return values_T.sum(0), values_T.new_full((), len(values_T))
    keep = ~padding_T
    masked = values_T * keep.view(-1, *[1] * (values_T.dim() - 1))
    return masked.sum(0), keep.sum().to(values_T.dtype)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
