"""Count the bytes that a rank sends along each axis for a micro-batch and for an update: whole numbers in and out.

Of n ranks each sends, at the least (and by a ring),

    gathering what each has        own bytes * (n - 1)
    summing and keeping a share    all bytes * (n - 1) / n
    summing                        all bytes * (n - 1) / n * 2

and of rows that are exchanged those that other ranks get. ``docs/parallelism.md`` shows what follows for a layer.
"""

from dataclasses import dataclass

__all__ = ["ExpertRows", "SplitPass", "gathered_bytes", "shared_bytes", "summed_bytes"]

_COUNT_BYTES = 8
_NUM_FATES = 12  # entries of a histogram for each expert: three choices, four fates
_LIKELIHOOD_NUMBERS = 3  # of a position on each tensor rank: highest logit, sum, target's logit


def gathered_bytes(own_bytes: int, ranks: int) -> int:
    """Count what a rank sends so that each of ``ranks`` has the ``own_bytes`` of all."""
    return own_bytes * (ranks - 1)


def shared_bytes(all_bytes: int, ranks: int) -> int:
    """Count what a rank sends so that each of ``ranks`` has its share of the sum of all their ``all_bytes``."""
    return -(-all_bytes * (ranks - 1) // ranks)


def summed_bytes(all_bytes: int, ranks: int) -> int:
    """Count what a rank sends so that each of ``ranks`` has the sum of all their ``all_bytes``."""
    return -(-2 * all_bytes * (ranks - 1) // ranks)


@dataclass(frozen=True, kw_only=True)
class SplitPass:
    """Count what a rank of a micro-batch sends to the others of it in a forward and a backward pass.

    Args:
        tokens: of a context rank, absent ones included: B * padded S / C.
        value_bytes: of one number that the model computes with.
        context: C, ranks with other positions.
        tensor: T, ranks with other heads and widths.
        forwards: 2 where layers are computed again in the backward pass, else 1.
    """

    tokens: int
    value_bytes: int
    context: int = 1
    tensor: int = 1
    forwards: int = 1

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number that must not be narrower than float32."""
        return max(self.value_bytes, 4)

    def block(self, *, gathered: int, scattered: int) -> int:
        """Count the bytes over tensor of attention or a dense network.

        Args:
            gathered: width of what tensor ranks gather on the way in: the model's, or those of latents.
            scattered: width of what they add up on the way out.
        """
        widths = gathered + scattered
        return (self.forwards + 1) * shared_bytes(self.tokens * widths * self.value_bytes, self.tensor)

    def squares(self, num_norms: int) -> int:
        """Count the bytes over tensor of norms over whole projections: one number each for a token."""
        numbers = self.tokens * num_norms
        return (self.forwards + 1) * summed_bytes(numbers * self.wide_bytes, self.tensor)

    def keys(self, width: int) -> int:
        """Count the bytes over context of attention; the backward pass gathers once more, and sums gradients.

        Args:
            width: of a token's keys and values on a rank, or of its latents.
        """
        return (self.forwards + 2) * gathered_bytes(self.tokens * width * self.value_bytes, self.context)

    def ends(self, dim: int) -> int:
        """Count the bytes over tensor of embedding, output projection and likelihood, which are not computed again."""
        widths = 4 * shared_bytes(self.tokens * dim * self.value_bytes, self.tensor)
        likelihood = self.tokens * _LIKELIHOOD_NUMBERS * self.wide_bytes
        return widths + gathered_bytes(likelihood, self.tensor)

    def loss(self) -> int:
        """Count the bytes over context of the likelihood: one number."""
        return summed_bytes(self.wide_bytes, self.context)

    def statistics(self, *, layers: int, experts: int, counts: int = 0, losses: int) -> int:
        """Count the bytes over context x tensor of what is counted and lost in layers with experts.

        Args:
            layers: that have experts.
            experts: E, of each.
            counts: further ones of a layer: E where a loss goes by other choices, B (E + 1) for losses of sequences.
            losses: numbers of a layer that are summed once for all layers.
        """
        ranks = self.context * self.tensor
        numbers = _NUM_FATES * experts + ranks + 1 + counts
        return layers * summed_bytes(numbers * _COUNT_BYTES, ranks) + summed_bytes(
            layers * losses * self.wide_bytes, ranks
        )


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """Count what a rank sends for one layer of experts, in a forward and a backward pass.

    Args:
        tokens: of this rank.
        top_k: experts of each token, which lie evenly on the ranks; nothing is dropped.
        dim: D, model width.
        value_bytes: of one number.
        expert: E, ranks with other experts.
        expert_tensor: X, ranks with other parts of each.
        forwards: 2 where the layer is computed again in the backward pass, else 1.
    """

    tokens: int
    top_k: int
    dim: int
    value_bytes: int
    expert: int
    expert_tensor: int = 1
    forwards: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks that exchange rows."""
        return self.expert * self.expert_tensor

    def sent(self) -> int:
        """Count the bytes of rows, there and back, with the all-to-all dispatcher: X copies of each."""
        rows = self.tokens * self.top_k * self.expert_tensor
        return 2 * (self.forwards + 1) * shared_bytes(rows * self.dim * self.value_bytes, self.ranks)

    def counted(self, experts: int) -> int:
        """Count the bytes of the numbers of rows that go ahead; ``experts`` is those of the layer."""
        return self.forwards * gathered_bytes(_COUNT_BYTES, self.ranks) * (experts // self.expert)

    def gathered(self) -> int:
        """Count the bytes with the allgather dispatcher: every token, its choices and its weights, to every rank."""
        values = 2 * self.dim * (self.forwards + 1) + self.top_k * (self.forwards + 1)
        ids = self.top_k * self.forwards
        own_bytes = self.tokens * (values * self.value_bytes + ids * _COUNT_BYTES)
        return gathered_bytes(own_bytes, self.ranks)
