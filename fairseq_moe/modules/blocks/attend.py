"""Causal attention over heads by torch's fused kernels, and the cache of incremental decoding."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Cache", "attend", "extended", "num_cached"]

Cache = dict[str, Tensor]  # one attention's keys and values (or latents) of earlier tokens, by name


def extended(cache: Cache | None, name: str, new: Tensor, *, dim: int) -> Tensor:
    """Append new values to those in the cache, and return both; without a cache, the new ones."""
    if cache is None:
        return new
    if name in cache:
        new = torch.cat([cache[name], new], dim)
    cache[name] = new
    return new


def num_cached(cache: Cache | None, name: str, *, dim: int) -> int:
    """Count the positions in the cache."""
    return cache[name].shape[dim] if cache is not None and name in cache else 0


def attend(
    q_BHSd: Tensor,
    k_BGTd: Tensor,
    v_BGTe: Tensor,
    *,
    scale: float,
    causal: bool = True,
    padding_BT: Tensor | None = None,
    padded_see_themselves: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(scale q k) v, where query head h uses key head floor(h G / H).

    Args:
        q_BHSd: float queries, the last S of T positions.
        k_BGTd: float keys; G divides H.
        v_BGTe: float values, of any size.
        scale: multiplies the scores.
        causal: no query sees later positions.
        padding_BT: bool, True where nobody looks.
        padded_see_themselves: except a padded position at itself: so that it gets finite values where it sees nothing
            else. Stock fairseq's do not.
        dropout: probability, on the attention weights; 0 outside training.

    Returns:
        float (B, S, H * e).
    """
    num_queries, num_keys = q_BHSd.shape[-2], k_BGTd.shape[-2]
    value_dim, missing = v_BGTe.shape[-1], q_BHSd.shape[-1] - v_BGTe.shape[-1]
    # Fused kernels take heads of one size; zeros cost less than scores written to memory.
    if missing > 0:
        v_BGTe = F.pad(v_BGTe, (0, missing))
    elif missing < 0:
        q_BHSd, k_BGTd = F.pad(q_BHSd, (0, -missing)), F.pad(k_BGTd, (0, -missing))
    whole = causal and num_queries == num_keys and padding_BT is None
    mask = None
    if not whole:
        mask = _visible(num_queries, num_keys, causal, padding_BT, padded_see_themselves, q_BHSd.device)
    y_BHSd = F.scaled_dot_product_attention(
        q_BHSd,
        k_BGTd,
        v_BGTe,
        attn_mask=mask,
        is_causal=whole,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=k_BGTd.shape[1] != q_BHSd.shape[1],
    )
    return y_BHSd[..., :value_dim].transpose(1, 2).flatten(2)


def _visible(
    num_queries: int,
    num_keys: int,
    causal: bool,
    padding_BT: Tensor | None,
    padded_see_themselves: bool,
    device: torch.device,
) -> Tensor | None:
    """Mark the keys that each query sees: bool, broadcastable to (B, H, S, T); None: all."""
    queries_S1 = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(-1)
    keys_T = torch.arange(num_keys, device=device)
    if padding_BT is None:
        return keys_T <= queries_S1 if causal and num_queries > 1 else None
    visible_B1ST = ~padding_BT[:, None, None, :]
    if padded_see_themselves:
        visible_B1ST = visible_B1ST | (keys_T == queries_S1)
    return visible_B1ST & (keys_T <= queries_S1) if causal else visible_B1ST
