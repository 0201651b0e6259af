"""Which keys a query sees, and attention in a sliding window without the scores that no window has.

Queries are cut into blocks, and each block gets the keys of its own positions and of the N - 1 before them: S x 2N
scores where a mask over all keys has S x S. The keys of all blocks lie side by side, as sequences of a batch do, so
that one call of the kernel does them all, and the gradient of a key is the sum of two slices.

On a CPU at 4,096 positions and N = 128 that takes a sixth of the time of attention without a window, and a twelfth
of that of a mask over all keys; a block twice as long as the window takes 1.3 times as long (docs/blocks.md).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_size", "look_in_blocks", "saves_keys", "visible"]

_MIN_BLOCK = 64  # smaller blocks copy more keys than they save scores


def visible(
    queries_S1: Tensor,
    keys_T: Tensor,
    *,
    causal: bool,
    window: int | None,
    padding: Tensor | None,
    see_themselves: bool,
) -> Tensor:
    """Mark the keys that each query sees: bool, of the shape to which all arguments broadcast.

    Args:
        queries_S1: int64 (..., S, 1), positions.
        keys_T: int64 (..., T), positions.
        causal: no query sees later positions.
        window: positions that a causal query sees, its own included; None: all earlier ones.
        padding: bool (..., 1, T), True where nobody looks; None: nowhere.
        see_themselves: except a padded position at itself.
    """
    near = keys_T <= queries_S1
    if window is not None:
        near = near & (keys_T > queries_S1 - window)
    if padding is None:
        return near
    seen = ~padding
    if see_themselves:
        seen = seen | (keys_T == queries_S1)
    return seen & near if causal else seen


def block_size(window: int) -> int:
    """Return how many queries of a window are looked at together."""
    return max(window, _MIN_BLOCK)


def saves_keys(num_queries: int, num_keys: int, window: int) -> bool:
    """Tell whether blocks have fewer scores than a mask over all keys has."""
    block = block_size(window)
    return num_queries > block and window - 1 + block < num_keys


def look_in_blocks(
    look: Callable[..., Tensor],
    q_BHSd: Tensor,
    k_BGTd: Tensor,
    v_BGTe: Tensor,
    *,
    window: int,
    padding_BT: Tensor | None,
    see_themselves: bool,
) -> Tensor:
    """Attend in a sliding window, block of queries by block.

    Args:
        look: attends; takes queries, keys, values and ``mask``.
        q_BHSd: float queries, the last S of T positions.
        k_BGTd: float keys, at most N - 1 more than queries.
        v_BGTe: float values.
        window: N, positions that a query sees, its own included.
        padding_BT: bool, True where nobody looks.
        see_themselves: see ``visible``.

    Returns:
        float (B, H, S, e).
    """
    batch, num_queries, num_keys = len(q_BHSd), q_BHSd.shape[-2], k_BGTd.shape[-2]
    block, before = block_size(window), window - 1
    # Absent positions, where nobody looks: before the first key, and after the last query.
    front, back = before - (num_keys - num_queries), -num_queries % block

    def with_earlier(values: Tensor) -> Tensor:
        """Cut (B, ..., before + S + back, x) into blocks, each with the positions before it: (B, blocks, ..., K, x)."""
        own = values[..., before:, :].unflatten(-2, (-1, block))
        earlier = values[..., : values.shape[-2] - before, :].unflatten(-2, (-1, block))[..., :before, :]
        return torch.cat([earlier.movedim(-3, 1), own.movedim(-3, 1)], -2)

    hidden_BT = q_BHSd.new_zeros(1, num_keys, dtype=torch.bool) if padding_BT is None else padding_BT
    hidden_BT = F.pad(hidden_BT, (front, back), value=True)
    keys_T = torch.arange(before + block, device=q_BHSd.device)
    mask = visible(
        keys_T[before:].unsqueeze(-1),
        keys_T,
        causal=True,
        window=window,
        padding=with_earlier(hidden_BT.unsqueeze(-1))[:, :, None, None, :, 0],
        see_themselves=see_themselves,
    )
    k, v = (with_earlier(F.pad(value, (0, 0, front, back))).flatten(0, 1) for value in (k_BGTd, v_BGTe))
    q = F.pad(q_BHSd, (0, 0, 0, back)).unflatten(-2, (-1, block)).transpose(1, 2).flatten(0, 1)
    y = look(q, k, v, mask=mask.expand(batch, -1, -1, -1, -1).flatten(0, 1))
    return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[..., :num_queries, :]
