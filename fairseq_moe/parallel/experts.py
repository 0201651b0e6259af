"""Which rank owns which expert: pure arithmetic on integers.

The W ranks form a grid of ``num_replicas`` rows and ``ep_size`` columns, row-major: rank = replica * ep_size
+ column. The ranks of one row exchange tokens (expert parallelism); the ranks of one column hold the same
experts and differ only in the tokens they saw (expert data parallelism). Experts are numbered globally
0..E-1 and lie contiguously: column c owns ids [c*L, (c+1)*L).

Unless a size is given, E >= W makes one row (every rank owns E/W experts), and with W > E every rank owns one
expert and each expert has W/E replicas. This is the layout of fairseq's moe branch.
"""

from dataclasses import dataclass

from fairseq_moe.errors import ConfigError

__all__ = ["ExpertLayout", "layout_problem"]


def layout_problem(*, num_experts: int, world_size: int, ep_size: int | None = None) -> str | None:
    """One sentence if ``num_experts`` cannot be spread evenly over ``world_size`` ranks, else None."""
    if ep_size is not None:
        if ep_size >= 1 and num_experts % ep_size == 0 and world_size % ep_size == 0:
            return None
        return (
            f"--expert-model-parallel-size is {ep_size}, expected a divisor of both the {num_experts} "
            f"experts and the {world_size} ranks."
        )
    if num_experts % world_size == 0 or world_size % num_experts == 0:
        return None
    return (
        f"{num_experts} experts do not fit {world_size} ranks: one of the two numbers must be a multiple of "
        "the other; choose another --moe-expert-count (--num-experts), another number of ranks, or give "
        "--expert-model-parallel-size."
    )


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """The grid of ranks and the experts of each.

    Args:
        num_experts: E, global experts of a layer.
        world_size: W, number of ranks.
        given_ep_size: columns of the grid; None: min(W, E).

    Raises:
        ConfigError: the experts cannot be spread evenly.
    """

    num_experts: int
    world_size: int
    given_ep_size: int | None = None

    def __post_init__(self) -> None:
        problem = layout_problem(
            num_experts=self.num_experts, world_size=self.world_size, ep_size=self.given_ep_size
        )
        if problem is not None:
            raise ConfigError([problem])

    @property
    def ep_size(self) -> int:
        """Ranks that exchange tokens with one another."""
        return self.given_ep_size or min(self.world_size, self.num_experts)

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
