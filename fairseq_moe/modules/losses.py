"""Auxiliary losses of routing: pure functions, unscaled; the criterion weighs and adds them."""

import torch
from torch import Tensor

from fairseq_moe.modules.routing import RoutingDecision, count_ids

__all__ = ["balance_loss"]


def balance_loss(gates_TE: Tensor, decision: RoutingDecision) -> Tensor:
    """The load-balancing loss of GShard (Lepikhin et al. 2020, equation 4) times E.

    E * sum_e( mean_t gates[t, e] * share of tokens whose first choice is e ), counted before the capacity
    cut; 1 when probabilities and choices are uniform. The gradient flows through the probabilities only.
    Padding tokens count in both means' denominators and in the first mean, as in fairseq's moe branch, but
    make no choice.

    Args:
        gates_TE: float gate probabilities.
        decision: a decision about the same tokens.

    Returns:
        float32 (or float64) scalar; 0 without tokens.
    """
    num_tokens, num_experts = gates_TE.shape
    if gates_TE.dtype in (torch.float16, torch.bfloat16):
        gates_TE = gates_TE.float()
    first_T = decision.expert_ids_TK[:, 0].masked_fill(~decision.wanted_TK[:, 0], num_experts)
    counts_E = count_ids(first_T, size=num_experts + 1)[:num_experts]
    denominator = max(num_tokens, 1)
    share_E = counts_E.to(gates_TE.dtype) / denominator
    mean_E = gates_TE.sum(dim=0) / denominator
    return num_experts * (mean_E * share_E).sum()
