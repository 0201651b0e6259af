"""Name the ways in which tokens and experts choose each other, and make the choices that no score decides."""

from enum import StrEnum

import torch
from torch import Tensor

from fairseq_moe.modules.routing.contract import RouterMode, TokenInfo

__all__ = ["Choice", "fixed_choice", "random_logits"]

# A multiplicative hash (Knuth, The Art of Computer Programming 3, 6.4) spreads neighbouring ids over the
# experts.
_HASH_MULTIPLIER = 2_654_435_761


class Choice(StrEnum):
    """Say who chooses whom, and by what.

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


def random_logits(logits_TE: Tensor, tokens: TokenInfo) -> Tensor:
    """Replace logits by standard normal ones while training; gradients pass through to the real ones."""
    if tokens.mode is not RouterMode.TRAIN:
        return logits_TE
    return logits_TE + (torch.randn_like(logits_TE) - logits_TE).detach()


def fixed_choice(
    choice: Choice, tokens: TokenInfo, num_tokens: int, num_experts: int, top_k: int, device: torch.device
) -> Tensor:
    """Choose K different experts per token whatever the scores, by ``hash`` or ``round_robin``: int64 (T, K)."""
    choices_K = torch.arange(top_k, device=device)
    if choice is Choice.ROUND_ROBIN:
        first_T = torch.arange(num_tokens, device=device) * top_k
        if tokens.padding_T is not None:
            first_T = ((~tokens.padding_T).cumsum(0) - 1) * top_k
    else:
        assert tokens.ids_T is not None
        first_T = (tokens.ids_T + 1) * _HASH_MULTIPLIER % (1 << 32) * num_experts >> 32
    return (first_T.unsqueeze(-1) + choices_K) % num_experts
