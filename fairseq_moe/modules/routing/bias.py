"""Balance without a loss, by a bias per expert that moves choices and never weights: pure update rules.

``sign`` moves each bias by a fixed step towards equal load (Wang et al. 2024, arXiv 2408.15664). ``quantile``
puts it where the load of this micro-batch would be equal (Megatron-Core's quantile balancing).
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

__all__ = ["BiasConfig", "BiasRule", "quantile_thresholds", "sign_step"]


class BiasRule(StrEnum):
    """Say how the bias follows the load."""

    SIGN = "sign"
    QUANTILE = "quantile"


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """Configure a router's expert bias.

    Args:
        rule: how the bias follows the load.
        update_rate: step of the ``sign`` rule.
    """

    rule: BiasRule
    update_rate: float = 1e-3


def sign_step(counts_E: Tensor, *, rate: float) -> Tensor:
    """Compute what is added to the bias after an update: rate * sign(mean load - load).

    Args:
        counts_E: requested assignments of each expert on all ranks in the update.
        rate: the step.

    Returns:
        float (E,).
    """
    counts_E = counts_E.to(torch.float32)
    return rate * torch.sign(counts_E.mean() - counts_E)


@torch.no_grad()
def quantile_thresholds(
    scores_TE: Tensor, bias_E: Tensor, *, top_k: int, padding_T: Tensor | None = None
) -> Tensor:
    """Find what must be taken from each expert's scores so that T * K / E tokens choose it.

    Expert e is chosen by a token when its score exceeds the token's (K+1)-th best biased score by more than
    its threshold; the threshold is the (T * K / E + 1)-th largest of these margins, T * K / E rounded down.

    Args:
        scores_TE: float scores that experts are chosen by, without bias.
        bias_E: float, today's bias.
        top_k: K.
        padding_T: bool, True where a token is padding; T counts the others.

    Returns:
        float (E,); the next bias is minus its mean over micro-batches and ranks, shifted to mean 0. Zeros
        without tokens, and where every token chooses every expert or an expert's share is all of them.
    """
    num_tokens, num_experts = scores_TE.shape
    if top_k >= num_experts or num_tokens == 0:
        return torch.zeros_like(bias_E)
    # To be chosen, an expert must beat the best of those that are not: the (K+1)-th.
    next_best_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=-1).values[:, -1:]
    margins_TE = scores_TE - next_best_T1
    num_valid = torch.full((), num_tokens, device=scores_TE.device)
    if padding_T is not None:
        # Padding sorts behind every token, and the share is one of the tokens that are none.
        margins_TE = margins_TE.masked_fill(padding_T.unsqueeze(-1), float("-inf"))
        num_valid = (~padding_T).sum()
    share = num_valid * top_k // num_experts
    # The share is a number on the device, so it selects from sorted margins: ``kthvalue`` would need it on the host.
    sorted_TE = margins_TE.sort(dim=0, descending=True).values
    found_E = sorted_TE.index_select(0, share.clamp(max=num_tokens - 1).view(1)).view(-1)
    return torch.where(share < num_valid, found_E, torch.zeros_like(found_E)).to(bias_E.dtype)
