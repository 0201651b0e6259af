"""Attention sinks: one more score of each query head that joins the softmax and takes no value (gpt-oss).

The sink is one more key, whose value is zeros, in front of all others. Heads are made wider, so that it may give each
query head a score of its own though keys are shared: of the further values, a query has one that is 1, the sink's key
has there what the query's head scores, and all other keys have zeros. So every fused kernel computes it, with every
mask, with dropout and on every device, autograd gives its gradient, and nothing of S x T is kept. On a CPU it takes
an eighth more time, as heads of 64 values grow by an eighth.

Fused attention times sigmoid(logsumexp - sink) would need no wider heads, but torch gives the sum of exponentials only
through private operators, another for each device and dtype, and no gradient through it. A mask that holds the sink's
score needs a gradient, for which torch 2.13 on a CPU keeps S x T numbers for each head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["num_further_values", "with_sink"]

_MULTIPLE = 8  # of a head's size, which fused kernels of GPUs ask for


def num_further_values(head_dim: int, heads_of_key: int) -> int:
    """Count the values by which heads grow.

    Args:
        head_dim: of queries and keys.
        heads_of_key: H / G, query heads that share a key head.
    """
    return -(-(head_dim + heads_of_key) // _MULTIPLE) * _MULTIPLE - head_dim


def with_sink(
    q_BHSd: Tensor,
    k_BGTd: Tensor,
    v_BGTe: Tensor,
    sinks_H: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put a key in front that each query head scores as its sink says, whatever the query.

    Args:
        q_BHSd: float queries.
        k_BGTd: float keys; G divides H.
        v_BGTe: float values.
        sinks_H: float, scores.
        mask: bool (..., S, T), True where a query sees a key; None: everywhere, or as ``is_causal`` says.
        is_causal: query i sees keys up to i; a query is put in front as well, so that this stays so.
        scale: multiplies the products of queries and keys.

    Returns:
        wider queries, keys, values and mask of 1 + T keys, and of S or, if causal, 1 + S queries.
    """
    num_heads, num_groups, dim = q_BHSd.shape[1], k_BGTd.shape[1], q_BHSd.shape[-1]
    size = num_heads // num_groups
    more = num_further_values(dim, size)
    which_Hd = F.pad(torch.eye(size, dtype=q_BHSd.dtype, device=q_BHSd.device), (0, more - size))
    which_Hd = which_Hd.repeat(num_groups, 1)
    q = torch.cat([q_BHSd, which_Hd[:, None, :].expand(*q_BHSd.shape[:-1], more)], -1)
    scores_G1d = (sinks_H / scale).to(k_BGTd.dtype).view(num_groups, 1, size)
    sink_G1d = F.pad(scores_G1d, (dim, more - size))
    k = torch.cat([sink_G1d.expand(len(k_BGTd), -1, -1, -1), F.pad(k_BGTd, (0, more))], -2)
    if is_causal:
        q = F.pad(q, (0, 0, 1, 0))
    return q, k, F.pad(v_BGTe, (0, 0, 1, 0)), None if mask is None else F.pad(mask, (1, 0), value=True)
