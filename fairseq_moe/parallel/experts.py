"""Which rank owns which expert: pure arithmetic on integers.

The ranks of an expert group (axis ``expert`` of ``parallel.ranks``) exchange tokens: expert parallelism. Those of a
replica group (axis ``expert_replica``) hold the same experts and differ only in the tokens they saw: expert data
parallelism. Experts are numbered globally 0..E-1 and lie contiguously: place p owns ids [p*L, (p+1)*L).

Unless a size is given, E >= W makes one expert group (every rank owns E/W experts), and with W > E every rank owns
one expert and each expert has W/E replicas. This is the layout of fairseq's moe branch.
"""

from dataclasses import dataclass

from fairseq_moe.errors import ConfigError
from fairseq_moe.parallel.ranks import RankGrid

__all__ = ["ExpertLayout", "layout_problem"]


def layout_problem(
    *,
    num_experts: int,
    world_size: int,
    ep_size: int | None = None,
    expert_tensor: int = 1,
    tensor: int = 1,
    context: int = 1,
    pipe: int = 1,
) -> str | None:
    """Say in one sentence why ``num_experts`` cannot be spread evenly over ``world_size`` ranks; None if they can."""
    if pipe < 1 or world_size % pipe:
        return f"--pipeline-model-parallel-size is {pipe}, expected a divisor of the {world_size} ranks."
    world_size //= pipe  # of a stage, as all that follows
    stage = " of a pipeline stage" if pipe > 1 else ""
    if tensor < 1 or context < 1 or world_size % (tensor * context):
        return (
            f"--tensor-model-parallel-size {tensor} times --context-parallel-size {context} is {tensor * context}, "
            f"expected a divisor of the {world_size} ranks{stage}."
        )
    if expert_tensor < 1 or world_size % expert_tensor:
        return f"--expert-tensor-parallel-size is {expert_tensor}, expected a divisor of the {world_size} ranks{stage}."
    places = world_size // expert_tensor  # of whole experts
    each = stage
    if expert_tensor > 1:
        each = f" ({world_size} ranks{stage}, {expert_tensor} for each expert)"
    if ep_size is not None:
        if ep_size >= 1 and num_experts % ep_size == 0 and places % ep_size == 0:
            return None
        return (
            f"--expert-model-parallel-size is {ep_size}, expected a divisor of both the {num_experts} "
            f"experts and the {places} ranks{each}."
        )
    if num_experts % places == 0 or places % num_experts == 0:
        return None
    return (
        f"{num_experts} experts do not fit {places} ranks{each}: one of the two numbers must be a multiple of "
        "the other; choose another --moe-expert-count (--num-experts), another number of ranks, or give "
        "--expert-model-parallel-size."
    )


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """Spreads the experts of a layer over a grid of ranks.

    Args:
        num_experts: E, global experts of a layer.
        world_size: W, number of ranks.
        given_ep_size: ranks of an expert group that hold different experts; None: as many as there can be.
        expert_tensor: X, ranks that hold a part of the same expert's width each.
        tensor: T, ranks that hold a part of the same heads and widths of all else.
        context: C, ranks that hold a part of the same sequences.
        pipe: P, stages of the pipeline, each with experts of its own layers.

    Raises:
        ConfigError: the experts cannot be spread evenly.
    """

    num_experts: int
    world_size: int
    given_ep_size: int | None = None
    expert_tensor: int = 1
    tensor: int = 1
    context: int = 1
    pipe: int = 1

    def __post_init__(self) -> None:
        problem = layout_problem(
            num_experts=self.num_experts,
            world_size=self.world_size,
            ep_size=self.given_ep_size,
            expert_tensor=self.expert_tensor,
            tensor=self.tensor,
            context=self.context,
            pipe=self.pipe,
        )
        if problem is not None:
            raise ConfigError([problem])

    @property
    def ranks(self) -> RankGrid:
        """The ranks, numbered along each axis."""
        return RankGrid(
            data=self.world_size // (self.pipe * self.tensor * self.context),
            pipe=self.pipe,
            context=self.context,
            tensor=self.tensor,
            expert=self.ep_size,
            expert_tensor=self.expert_tensor,
        )

    @property
    def ep_size(self) -> int:
        """Number of ranks of an expert group that hold different experts."""
        places = self.world_size // (self.pipe * self.expert_tensor)
        return self.given_ep_size or min(places, self.num_experts)

    @property
    def num_replicas(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.ranks.expert_replica

    @property
    def num_local_experts(self) -> int:
        """Number of experts that one rank holds: L."""
        return self.num_experts // self.ep_size

    def local_ids(self, rank: int) -> range:
        """List the global ids of the experts that ``rank`` holds."""
        first = self.ranks.coordinate(rank, "expert") * self.num_local_experts
        return range(first, first + self.num_local_experts)
