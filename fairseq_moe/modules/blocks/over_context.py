"""Causal attention of one context rank: its own queries, and the keys and values of all of them.

Keys and values (or latents, which are smaller) are gathered over context. That is cheaper than passing blocks round a
ring until sequences are so long that keys do not fit, and any kernel for causal attention will do. The two chunks of a
rank's queries each see the keys up to their own end, in a window from where it begins.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_moe.modules.recompute import recomputed
from fairseq_moe.modules.shards import Shards

__all__ = ["attend_over_context"]


def attend_over_context(
    look: Callable[..., Tensor],
    q_BHSd: Tensor,
    sources: tuple[Tensor, ...],
    keys_and_values: Callable[..., tuple[Tensor, Tensor]],
    *,
    shards: Shards,
    padding_BT: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """Attend causally over the positions of all context ranks.

    The backward pass gathers and attends once more, so that a rank keeps nothing of the length of a whole sequence.

    Args:
        look: ``attend``, with all arguments but queries, keys, values and padding.
        q_BHSd: float, queries of this rank.
        sources: float (..., S, any), of this rank's positions, from which keys and values are made; of equal shapes
            but for the last axis.
        keys_and_values: makes both of the gathered sources: (..., T, any) each.
        shards: the context ranks.
        padding_BT: bool, True = padding, of all positions.
        window: positions that a query sees, its own included; None: all earlier ones.

    Returns:
        float (B, S, heads * size of a value).
    """

    def run(q_BHSd: Tensor, *sources: Tensor) -> Tensor:
        widths = [source.shape[-1] for source in sources]
        gathered = shards.gather_context(torch.cat(sources, -1), dim=-2)
        k_BGTd, v_BGTe = keys_and_values(*gathered.split(widths, -1))
        found = []
        spans = shards.part_of(k_BGTd.shape[-2]).spans
        for chunk_BHSd, span in zip(q_BHSd.chunk(len(spans), -2), spans, strict=True):
            seen = slice(0 if window is None else max(span.start - window + 1, 0), span.stop)
            found.append(
                look(
                    chunk_BHSd,
                    k_BGTd[..., seen, :],
                    v_BGTe[..., seen, :],
                    padding_BT=None if padding_BT is None else padding_BT[:, seen],
                )
            )
        return torch.cat(found, 1)

    output: Tensor = recomputed(run, q_BHSd, *sources)
    return output
