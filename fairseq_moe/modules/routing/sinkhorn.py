"""Balance by Sinkhorn's algorithm (S-BASE, arXiv 2202.01169): an optimal-transport plan from tokens to experts."""

import torch
from torch import Tensor

__all__ = ["sinkhorn_plan"]

_EPS = 1e-8
_TOLERANCE = 1e-4
_MAX_ITERATIONS = 20


@torch.no_grad()
def sinkhorn_plan(logits_TE: Tensor, *, padding_T: Tensor | None = None) -> Tensor:
    """Scale exp(logits) until each expert's entries sum to 1/E and each token's to about 1/T.

    A token's logits are shifted by their maximum first, which leaves the plan as it is and exp() in range. Iterations
    stop when the factors of the experts move by less than 1e-4 on average, and after 20 at the latest. The stopped
    iterations are masked rather than left out, so the function compiles as a whole and does not wait for the
    device.

    Args:
        logits_TE: float router logits of this rank's tokens.
        padding_T: bool, True where a token is padding: its entries are 0, and T counts the others.

    Returns:
        float32 (T, E), or float64 for float64 logits.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    num_experts = logits_TE.shape[1]
    num_tokens = logits_TE.new_full((), len(logits_TE))
    cost_TE = torch.exp(logits_TE - logits_TE.amax(-1, keepdim=True))
    if padding_T is not None:
        cost_TE = cost_TE.masked_fill(padding_T.unsqueeze(-1), 0.0)
        num_tokens = (~padding_T).sum().clamp(min=1).to(logits_TE.dtype)
    token_scale_T = cost_TE.new_ones(len(cost_TE))
    expert_scale_E = cost_TE.new_ones(num_experts)
    moving = torch.ones((), dtype=torch.bool, device=logits_TE.device)
    with torch.autocast(cost_TE.device.type, enabled=False):  # which would round the products
        for _ in range(_MAX_ITERATIONS):
            new_token_scale_T = 1 / (num_tokens * (cost_TE @ expert_scale_E + _EPS))
            new_expert_scale_E = 1 / (num_experts * (new_token_scale_T @ cost_TE + _EPS))
            moved = (new_expert_scale_E - expert_scale_E).abs().mean()
            token_scale_T = torch.where(moving, new_token_scale_T, token_scale_T)
            expert_scale_E = torch.where(moving, new_expert_scale_E, expert_scale_E)
            moving = moving & (moved > _TOLERANCE)
    return token_scale_T.unsqueeze(-1) * cost_TE * expert_scale_E
