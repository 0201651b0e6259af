"""A warning for experts that most tokens have asked for, for long.

Without a limit on places (dropless routing) such an expert's rank computes and holds most of the layer's rows while
the others wait; with one, most of its tokens are dropped. Either way the layer has become a dense one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LoadWatch"]

_UPDATES = 100  # in a row, before the first warning; then twice as many, and so on


class LoadWatch:
    """Watches the load of every training update for an expert that takes most tokens.

    An expert is overloaded in an update if more than half of the tokens asked for it and it got at least twice the
    layer's mean. One update, or a hundred at the start, may well be so: a warning needs ``_UPDATES`` in a row with the
    same expert, and comes again when that number has doubled.

    Args:
        layers: numbers of the decoder layers with experts.
        top_k: K, experts per token.
    """

    def __init__(self, *, layers: Sequence[int], top_k: int) -> None:
        self._top_k = top_k
        # By layer: the overloaded expert, since how many updates, and when to warn next.
        self._since = {layer: (-1, 0, _UPDATES) for layer in layers}

    def observe(self, load: Tensor) -> list[str]:
        """Take in one update's load, and return the warnings that it gives rise to.

        Args:
            load: float (N, 2, E), assignments requested (entry 0) and kept, summed over ranks and micro-batches.
        """
        wanted_NE = load[:, 0]
        tokens_N = wanted_NE.sum(-1) / self._top_k
        most_N, expert_N = wanted_NE.max(-1)
        is_overloaded_N = (most_N > tokens_N / 2) & (most_N >= 2 * wanted_NE.mean(-1))
        found = []
        seen_3N = torch.stack([expert_N.to(load.dtype), is_overloaded_N.to(load.dtype), most_N / tokens_N])
        for layer, (number, is_overloaded, share) in zip(self._since, seen_3N.t().tolist(), strict=True):
            expert = int(number)
            before, updates, limit = self._since[layer]
            if not is_overloaded:
                self._since[layer] = (-1, 0, _UPDATES)
                continue
            updates, limit = (updates + 1, limit) if expert == before else (1, _UPDATES)
            if updates >= limit:
                limit *= 2
                fair = self._top_k / wanted_NE.shape[1]
                found.append(
                    f"layer {layer}: {share:.0%} of the tokens ask for expert {expert}, and more than half did in "
                    f"each of the last {updates} updates (a fair share is {fair:.0%}), so its rank computes most of "
                    "the layer or drops most of these tokens; weigh the balance loss more (--moe-gate-loss-wt, "
                    "--moe-aux-loss-coeff)."
                )
            self._since[layer] = (expert, updates, limit)
        return found
