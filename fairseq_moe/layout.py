"""Which rank owns which expert: pure arithmetic on integers.

The W ranks form a grid of ``num_replicas`` rows and ``ep_size`` columns, row-major: rank = replica * ep_size
+ column. The ranks of one row exchange tokens (expert parallelism); the ranks of one column hold the same
experts and differ only in the tokens they saw (expert data parallelism). Experts are numbered globally
0..E-1 and lie contiguously: column c owns ids [c*L, (c+1)*L).

With E >= W there is one row (every rank owns E/W experts); with W > E every rank owns one expert and each
expert has W/E replicas. This is the layout of fairseq's moe branch.
"""

from dataclasses import dataclass

from fairseq_moe.errors import ConfigError

__all__ = ["ExpertLayout", "layout_problem"]


def layout_problem(*, num_experts: int, world_size: int) -> str | None:
    """One sentence if ``num_experts`` cannot be spread evenly over ``world_size`` ranks, else None."""
    if num_experts % world_size == 0 or world_size % num_experts == 0:
        return None
    return (
        f"--moe-expert-count {num_experts} does not fit {world_size} ranks: one of the two numbers must be a "
        f"multiple of the other; choose a multiple or a divisor of {world_size}."
    )


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """The grid of ranks and the experts of each.

    Args:
        num_experts: E, global experts of a layer.
        world_size: W, number of ranks.

    Raises:
        ConfigError: neither number is a multiple of the other.
    """

    num_experts: int
    world_size: int

    def __post_init__(self) -> None:
        problem = layout_problem(num_experts=self.num_experts, world_size=self.world_size)
        if problem is not None:
            raise ConfigError([problem])

    @property
    def ep_size(self) -> int:
        """Ranks that exchange tokens with one another."""
        return min(self.world_size, self.num_experts)

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.ep_size

    @property
    def num_local_experts(self) -> int:
        """L, experts held by one rank."""
        return self.num_experts // self.ep_size

    def local_ids(self, rank: int) -> range:
        """Global ids of the experts that ``rank`` holds."""
        first = (rank % self.ep_size) * self.num_local_experts
        return range(first, first + self.num_local_experts)

    def exchange_ranks(self, rank: int) -> list[int]:
        """The ranks that ``rank`` exchanges tokens with, itself included, in the order of their experts."""
        first = rank - rank % self.ep_size
        return list(range(first, first + self.ep_size))

    def replica_ranks(self, rank: int) -> list[int]:
        """The ranks that hold the same experts as ``rank``, itself included."""
        return list(range(rank % self.ep_size, self.world_size, self.ep_size))

    def is_owner(self, rank: int) -> bool:
        """Whether ``rank`` is the replica that writes its experts into a checkpoint."""
        return rank < self.ep_size
