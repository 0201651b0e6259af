"""Causal attention over heads by torch's fused kernels, and the cache of incremental decoding."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.blocks.sink import with_sink
from fairseq_moe.modules.blocks.window import look_in_blocks, saves_keys, visible

__all__ = ["Cache", "attend", "extended", "forget", "num_seen"]

Cache = dict[str, Tensor]  # one attention's keys and values (or latents) of earlier tokens, by name
_FORGOTTEN = "forgotten"


def extended(cache: Cache | None, name: str, new: Tensor, *, dim: int) -> Tensor:
    """Append new values to those in the cache, and return both; without a cache, the new ones."""
    if cache is None:
        return new
    if name in cache:
        new = torch.cat([cache[name], new], dim)
    cache[name] = new
    return new


def forget(cache: Cache | None, *, num_kept: int, dims: dict[str, int]) -> None:
    """Drop all but the last positions from a cache, and their memory with them.

    Args:
        cache: of one attention; None: there is none.
        num_kept: positions that later tokens can see.
        dims: along which positions lie, by name; names that the cache lacks are passed over.
    """
    present = {} if cache is None else {name: dim for name, dim in dims.items() if name in cache}
    if cache is None or not present:
        return
    num_left = max(cache[name].shape[dim] for name, dim in present.items()) - num_kept
    if num_left <= 0:
        return
    for name, dim in present.items():
        cache[name] = cache[name].narrow(dim, num_left, num_kept).clone()
    # Counted by the size of a tensor without elements: beams are reordered as in every other tensor, and the host need
    # not wait for a device to read it.
    kept = cache[next(iter(present))]
    cache[_FORGOTTEN] = kept.new_empty(len(kept), _num_forgotten(cache) + num_left, 0)


def num_seen(cache: Cache | None, name: str, *, dim: int) -> int:
    """Count the positions before the new ones: those in the cache, and those that it has forgotten."""
    if cache is None or name not in cache:
        return 0
    return cache[name].shape[dim] + _num_forgotten(cache)


def _num_forgotten(cache: Cache) -> int:
    return cache[_FORGOTTEN].shape[1] if _FORGOTTEN in cache else 0


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
    sinks_H: Tensor | None = None,
    window: int | None = None,
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
        sinks_H: float, one more score of each query head, whose weight takes no value; None: there is none.
        window: positions that a query sees, its own included; causal attention only. None: all earlier ones.

    Returns:
        float (B, S, H * e).
    """
    look = functools.partial(_look, scale=scale, dropout=dropout, sinks_H=sinks_H)
    num_queries = q_BHSd.shape[-2]
    if window is not None:
        assert causal
        k_BGTd, v_BGTe = (value[..., -(num_queries + window - 1) :, :] for value in (k_BGTd, v_BGTe))
        padding_BT = None if padding_BT is None else padding_BT[:, -k_BGTd.shape[-2] :]
    num_keys = k_BGTd.shape[-2]
    if window is not None and window >= num_keys:
        window = None  # everything that is left
    if window is not None and saves_keys(num_queries, num_keys, window):
        y_BHSe = look_in_blocks(
            look,
            q_BHSd,
            k_BGTd,
            v_BGTe,
            window=window,
            padding_BT=padding_BT,
            see_themselves=padded_see_themselves,
        )
        return y_BHSe.transpose(1, 2).flatten(2)
    mask = None
    whole = causal and num_queries == num_keys and padding_BT is None and window is None
    if not whole and (padding_BT is not None or (causal and num_queries > 1)):
        positions_T = torch.arange(num_keys, device=q_BHSd.device)
        mask = visible(
            positions_T[-num_queries:].unsqueeze(-1),
            positions_T,
            causal=causal,
            window=window,
            padding=None if padding_BT is None else padding_BT[:, None, None, :],
            see_themselves=padded_see_themselves,
        )
    return look(q_BHSd, k_BGTd, v_BGTe, mask=mask, is_causal=whole).transpose(1, 2).flatten(2)


def _look(
    q_BHSd: Tensor,
    k_BGTd: Tensor,
    v_BGTe: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool = False,
    scale: float,
    dropout: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """Run the fused kernel: (B, H, S, e); ``mask`` is bool, True where a query sees a key."""
    num_queries, value_dim = q_BHSd.shape[-2], v_BGTe.shape[-1]
    if sinks_H is not None:
        q_BHSd, k_BGTd, v_BGTe, mask = with_sink(
            q_BHSd, k_BGTd, v_BGTe, sinks_H, mask=mask, is_causal=is_causal, scale=scale
        )
    missing = q_BHSd.shape[-1] - v_BGTe.shape[-1]
    # Fused kernels take heads of one size; zeros cost less than scores written to memory.
    if missing > 0:
        v_BGTe = F.pad(v_BGTe, (0, missing))
    elif missing < 0:
        q_BHSd, k_BGTd = F.pad(q_BHSd, (0, -missing)), F.pad(k_BGTd, (0, -missing))
    y_BHSd = F.scaled_dot_product_attention(
        q_BHSd,
        k_BGTd,
        v_BGTe,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=k_BGTd.shape[1] != q_BHSd.shape[1],
    )
    return y_BHSd[..., -num_queries:, :value_dim]
