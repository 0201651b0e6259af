"""Share the positions of a sequence out among ranks: in balanced halves over context, then in parts over tensor.

A causal model's later positions see more keys. So with C context ranks a sequence is cut into 2C chunks, and rank c has
chunks c and 2C-1-c: the same work for each (Megatron-Core does so, too). What a context rank has is cut into T
neighbouring parts, one for each tensor rank. Lengths that do not divide are continued with *absent* positions at the
end: no word, no target, routed nowhere, and seen by none of the others, which are all earlier.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SequencePart"]


@dataclass(frozen=True, kw_only=True)
class SequencePart:
    """Find a rank's positions in sequences of S.

    Args:
        length: S, positions that are there.
        context: C, ranks over which sequences are cut in halves.
        tensor: T, ranks over which what a context rank has is cut further.
        context_index: of this rank.
        tensor_index: of this rank.
    """

    length: int
    context: int = 1
    tensor: int = 1
    context_index: int = 0
    tensor_index: int = 0

    @property
    def padded_length(self) -> int:
        """Count the positions with those that are absent: a multiple of 2CT, or of T without context."""
        unit = self.tensor * (2 * self.context if self.context > 1 else 1)
        return -(-self.length // unit) * unit

    @property
    def spans(self) -> tuple[slice, ...]:
        """List the positions of this context rank, in rising order."""
        if self.context == 1:
            return (slice(0, self.padded_length),)
        chunk = self.padded_length // (2 * self.context)
        indices = (self.context_index, 2 * self.context - 1 - self.context_index)
        return tuple(slice(index * chunk, (index + 1) * chunk) for index in indices)

    @property
    def num_own(self) -> int:
        """Count the positions that are this rank's alone, with those that are absent."""
        return self.padded_length // (self.context * self.tensor)

    @property
    def num_present(self) -> int:
        """Count those of them that are there; they come first, as positions rise."""
        of_context = sum(min(max(self.length - span.start, 0), span.stop - span.start) for span in self.spans)
        return min(max(of_context - self.tensor_index * self.num_own, 0), self.num_own)

    def of_context(self, whole: Tensor, *, dim: int, filler: float = 0) -> Tensor:
        """Take this context rank's positions out of a tensor of S along ``dim``; absent ones hold ``filler``."""
        before = whole.dim() - 1 - dim % whole.dim()
        padding = (0, 0) * before + (0, self.padded_length - whole.shape[dim])
        padded = F.pad(whole, padding, value=filler)
        parts = [padded.narrow(dim, span.start, span.stop - span.start) for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def own(self, whole: Tensor, *, dim: int, filler: float = 0) -> Tensor:
        """Take the positions that are this rank's alone out of a tensor of S along ``dim``."""
        of_context = self.of_context(whole, dim=dim, filler=filler)
        return of_context.narrow(dim, self.tensor_index * self.num_own, self.num_own)

    def in_order(self, gathered: list[Tensor], *, dim: int) -> Tensor:
        """Put the positions of all context ranks, in the order of ranks, back into the order of positions."""
        if self.context == 1:
            return gathered[0]
        halves = [tensor.chunk(2, dim) for tensor in gathered]
        return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)
