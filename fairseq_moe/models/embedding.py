"""Embed words of a vocabulary whose padding symbol is none of its words."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WordEmbedding", "build_word_embedding"]


class WordEmbedding(nn.Embedding):
    """Keep one row per word; padding has no row and gives zeros, to which no gradient flows.

    Args:
        num_words: V.
        dim: D.
        pad: the id of padding, outside 0 .. V-1.
    """

    def __init__(self, num_words: int, dim: int, *, pad: int) -> None:
        super().__init__(num_words, dim)
        self.padding_idx = pad

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of words: int64 (...) -> float (..., D)."""
        assert self.padding_idx is not None
        is_padding = ids.eq(self.padding_idx)
        rows = F.embedding(ids.masked_fill(is_padding, 0), self.weight)
        return rows.masked_fill(is_padding.unsqueeze(-1), 0.0)


def build_word_embedding(dictionary: Any, dim: int) -> nn.Embedding:
    """Build embeddings for a ``dictionary``; where padding counts among its words, it has a row of zeros."""
    num_words, pad = len(dictionary), dictionary.pad()
    if pad >= num_words:
        return WordEmbedding(num_words, dim, pad=pad)
    return nn.Embedding(num_words, dim, padding_idx=pad)
