"""Say which positions and words of a micro-batch's logits a rank has."""

from dataclasses import dataclass

from torch import Tensor

from fairseq_moe.modules.shards.contract import Shards
from fairseq_moe.modules.shards.positions import SequencePart

__all__ = ["ShardedOutput"]


@dataclass(frozen=True, kw_only=True)
class ShardedOutput:
    """Say what a model's output is a part of: logits (B, S / C, words of this rank), absent positions at the end.

    Args:
        shards: joins this rank with those that have the other positions and words of the same micro-batch.
        part: positions of this rank.
        first_word: id of the word that column 0 of the logits belongs to.
        num_words: columns of the logits; ids run on from the first one's. A rank may have none.
    """

    shards: Shards
    part: SequencePart
    first_word: int
    num_words: int

    def targets_of(self, target_BS: Tensor, *, ignore_index: int) -> Tensor:
        """Take the targets of this rank's positions, (B, S) -> (B, S / C); absent ones have ``ignore_index``."""
        return self.part.of_context(target_BS, dim=1, filler=ignore_index)

    def columns_of(self, target: Tensor, *, ignore_index: int) -> Tensor:
        """Find the columns of targets in this rank's logits: -1 where left out, V at a word that is not this rank's."""
        column = target - self.first_word
        is_elsewhere = (column < 0) | (column >= self.num_words)
        return column.masked_fill(is_elsewhere, self.num_words).masked_fill(target == ignore_index, -1)
