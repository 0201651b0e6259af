"""Have the ranks that share micro-batches read the same words? A checksum of each, compared at every update.

Ranks that read different files, or are at different places in them, would each compute with other words in what they
exchange, and every number would look as if all were well.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.distributed import gather_values
from fairseq_moe.errors import RanksDisagreeError
from fairseq_moe.parallel.ranks import BATCH_RANKS, RankGrid

__all__ = ["WordsRead"]

# A prime so small that sums over ranks of squares of what is below it are exact in float64, and products in int64.
_PRIME = 1_048_573
_BASE = 7_919  # any number below it whose powers differ for long
_MAX_LISTED = 8


class WordsRead:
    """Make one number of all words that a rank reads in an update, and compare it with the others'.

    Args:
        ranks: of the run; several share each micro-batch.
    """

    def __init__(self, ranks: RankGrid) -> None:
        self._ranks = ranks
        self._checksum: Tensor | int = 0

    def begin_update(self) -> None:
        """Forget the last update's words."""
        self._checksum = 0

    def see(self, sample: Mapping[str, Any]) -> None:
        """Add a micro-batch's words and targets, in whole numbers, on their device."""
        found = (sample.get("net_input", {}).get("src_tokens"), sample.get("target"))
        for words in found:
            if isinstance(words, Tensor):
                self._checksum = (self._checksum * _BASE + _checksum(words)) % _PRIME

    def values(self, rank: int, device: torch.device) -> Tensor:
        """Put this rank's checksum and its square into the slots of its data rank: (2 * data ranks,) float64."""
        num_slots, slot = self._ranks.num_slots(BATCH_RANKS), self._ranks.slot(rank, BATCH_RANKS)
        vector = torch.zeros(2 * num_slots, dtype=torch.float64, device=device)
        vector[slot] = self._checksum
        vector[num_slots + slot] = self._checksum * self._checksum
        return vector

    def judge(self, sums: list[float]) -> None:
        """Compare the checksums of each micro-batch, the same on every rank.

        Args:
            sums: of every rank's ``values``.

        Raises:
            RanksDisagreeError: ranks have read different words.
        """
        num_slots, count = self._ranks.num_slots(BATCH_RANKS), self._ranks.size(BATCH_RANKS)
        differ = [
            slot
            for slot in range(num_slots)
            if count * int(sums[num_slots + slot])
            != int(sums[slot]) ** 2  # sums of equal numbers alone are so
        ]
        if not differ:
            return
        checksums = gather_values(int(self._checksum))  # every rank has seen the same sums and is here
        members = self._ranks.groups(BATCH_RANKS)[differ[0]]
        by_words: dict[int, list[int]] = {}
        for member in members:
            by_words.setdefault(checksums[member], []).append(member)
        parties = " and ".join(_named(party) for party in by_words.values())
        raise RanksDisagreeError(
            f"ranks {', '.join(map(str, members))} share their micro-batches, and have read different words in this "
            f"update ({parties} differ); give all ranks the same data, dictionary and flags.",
            agreed=True,
        )


def _checksum(words: Tensor) -> Tensor:
    """Weigh each word by its place, and the shape with them: an int64 scalar below the prime."""
    places = torch.arange(1, words.numel() + 1, device=words.device)
    weights = (places * _BASE + places * places) % _PRIME
    total = (words.reshape(-1).long() % _PRIME * weights % _PRIME).sum()
    return (total + _BASE * words.shape[-1] + words.numel()) % _PRIME


def _named(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_MAX_LISTED])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (" and more" if len(ranks) > _MAX_LISTED else "")
