"""Join the tokens and widths of a rank with those of the ranks that compute the same micro-batch.

Between blocks each of C x T ranks has tokens of its own (sequence parallelism). Inside attention and dense networks
the T tensor ranks have the same tokens and other heads and widths, as in Megatron-LM (Narayanan et al. 2021, arXiv
2104.04473; Korthikanti et al. 2022, arXiv 2205.05198). A block gathers tokens on its way in; on its way out it adds
parts up and takes its own tokens. ``LocalShards`` is one rank, for which nothing of this is done.
"""

from typing import Protocol

from torch import Tensor, nn

from fairseq_moe.modules.shards.positions import SequencePart

__all__ = ["LocalShards", "Shards"]


class Shards(Protocol):
    """Join what the ranks of a micro-batch hold; all of them call the same methods in the same order.

    Attributes:
        context: C, ranks with other positions of the same sequences.
        tensor: T, ranks with other heads and widths.
        context_index: of this rank.
        tensor_index: of this rank.
    """

    context: int
    tensor: int
    context_index: int
    tensor_index: int

    def part_of(self, length: int) -> SequencePart:
        """Find this rank's positions in sequences of this length."""
        ...

    def gather(self, x_BSD: Tensor) -> Tensor:
        """Gather the tokens of the tensor ranks: (B, S / (C T), D) -> (B, S / C, D); its gradient is summed back."""
        ...

    def project_back(self, linear: nn.Linear, y_BSN: Tensor) -> Tensor:
        """Apply a linear map whose inputs are spread over tensor, and take this rank's tokens of the sum.

        Args:
            linear: its weight has the columns of this rank's inputs; the bias is whole, and added once.
            y_BSN: float (B, S / C, inputs of this rank).

        Returns:
            (B, S / (C T), outputs).
        """
        ...

    def scatter_sum(self, x_BSD: Tensor) -> Tensor:
        """Add up what the tensor ranks have, and take this rank's tokens: (B, S / C, D) -> (B, S / (C T), D)."""
        ...

    def gather_context(self, x: Tensor, *, dim: int) -> Tensor:
        """Gather what the context ranks have along ``dim``, in the order of positions; its gradient is summed back."""
        ...

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        """Add up what tensor ranks have, of which each makes something else: gradients are added up, too."""
        ...

    def stack_over_tensor(self, values: Tensor) -> Tensor:
        """Stack what tensor ranks have of one shape, without a gradient: (...) -> (T, ...), the same on all of them."""
        ...

    def total(self, shares: Tensor) -> Tensor:
        """Add up shares of one value over all C x T ranks; each share gets the gradient of the sum."""
        ...

    def total_over_context(self, shares: Tensor) -> Tensor:
        """Add up shares over context alone, where tensor ranks have the same; each share gets the sum's gradient."""
        ...

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Add up counts over all C x T ranks, without a gradient, in fresh memory."""
        ...

    def gather_tokens(self, values_TN: Tensor) -> Tensor:
        """Gather rows of all C x T ranks, as many of each, without a gradient: (T, N) -> (C T * T, N)."""
        ...


class LocalShards:
    """Join nothing, on a rank that computes micro-batches alone."""

    context = tensor = 1
    context_index = tensor_index = 0

    def part_of(self, length: int) -> SequencePart:
        """Find all positions of a sequence on one rank."""
        return SequencePart(length=length)

    def gather(self, x_BSD: Tensor) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return x_BSD

    def project_back(self, linear: nn.Linear, y_BSN: Tensor) -> Tensor:
        """Apply the linear map."""
        output: Tensor = linear(y_BSN)
        return output

    def scatter_sum(self, x_BSD: Tensor) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return x_BSD

    def gather_context(self, x: Tensor, *, dim: int) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return x

    def sum_over_tensor(self, x: Tensor) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return x

    def stack_over_tensor(self, values: Tensor) -> Tensor:
        """Stack what one rank has: (...) -> (1, ...), without a gradient."""
        return values.detach().unsqueeze(0)

    def total(self, shares: Tensor) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return shares

    def total_over_context(self, shares: Tensor) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return shares

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return counts

    def gather_tokens(self, values_TN: Tensor) -> Tensor:
        """Return the input: one rank has all tokens and widths."""
        return values_TN
