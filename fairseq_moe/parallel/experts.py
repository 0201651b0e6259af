"""Which rank owns which expert: pure arithmetic on integers.

The W ranks form a grid of ``num_replicas`` expert groups of ``ep_size`` ranks: rank = group * ep_size + place.
The ranks of an expert group exchange tokens (expert parallelism); the ranks at one place of all groups are a
replica group: they hold the same experts and differ only in the tokens they saw (expert data parallelism).
Experts are numbered globally 0..E-1 and lie contiguously: place p owns ids [p*L, (p+1)*L).

Unless a size is given, E >= W makes one expert group (every rank owns E/W experts), and with W > E every rank owns
one expert and each expert has W/E replicas. This is the layout of fairseq's moe branch.
"""

from dataclasses import dataclass

from fairseq_moe.errors import ConfigError

__all__ = ["ExpertLayout", "layout_problem"]


def layout_problem(*, num_experts: int, world_size: int, ep_size: int | None = None) -> str | None:
    """Say in one sentence why ``num_experts`` cannot be spread evenly over ``world_size`` ranks; None if they can."""
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
    """Spreads the experts of a layer over a grid of ranks.

    Args:
        num_experts: E, global experts of a layer.
        world_size: W, number of ranks.
        given_ep_size: ranks of an expert group; None: min(W, E).

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
        """Number of ranks that exchange tokens with one another."""
        return self.given_ep_size or min(self.world_size, self.num_experts)

    @property
    def num_replicas(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.world_size // self.ep_size

    @property
    def num_local_experts(self) -> int:
        """Number of experts that one rank holds: L."""
        return self.num_experts // self.ep_size

    def local_ids(self, rank: int) -> range:
        """List the global ids of the experts that ``rank`` holds."""
        first = (rank % self.ep_size) * self.num_local_experts
        return range(first, first + self.num_local_experts)

    def is_owner(self, rank: int) -> bool:
        """Tell whether ``rank`` is the replica that writes its experts into a checkpoint."""
        return rank < self.ep_size
