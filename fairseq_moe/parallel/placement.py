"""How a parameter lies on the ranks: where it is cut, over which ranks its copies are summed, and where it is sharded.

The axes are those of ``parallel.ranks``. Two rules have no exception:

- A gradient is whole once it has been summed over every axis of the stage along which its parameter is not cut.
- A backend that shards states keeps, in place of equal copies, one shard of each on the ranks of some of these axes;
  along them it has averaged the gradients, and the norm meets each shard once.

So an entry of the table says who sums a gradient, by what it is divided, how often the norm meets it, which ranks must
hold the same, and who writes it into a checkpoint. A further kind of parallelism adds entries here, and no question
elsewhere. No tensor and no process group is touched.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fairseq_moe.parallel.ranks import DENSE_AXES, EXPERT_AXES, RankGrid

__all__ = [
    "COPIED_OVER",
    "DENSE",
    "DENSE_SHARDS",
    "EXPERT",
    "EXPERT_SHARDS",
    "TENSOR_COLUMNS",
    "TENSOR_GATED_ROWS",
    "TENSOR_ROWS",
    "Cut",
    "Placement",
    "expert_placements",
    "gradient_divisor",
    "holds_first_copy",
    "is_expert",
    "is_second_end",
    "marks_of",
    "num_copies",
    "place",
    "placement_of",
    "shard",
    "shard_dim",
    "vocabulary_placement",
]

_ATTRIBUTE = "placement"
# From this many rows per rank on, uneven parts differ by so little that the first dimension is divided all the same.
_MANY_ROWS = 16


class Cut(NamedTuple):
    """Say that each rank along an axis holds another part of a parameter.

    Args:
        axis: of the ranks.
        dim: of the parameter.
        blocks: equal blocks along that dimension, of each of which a rank holds its part: gate and up.
        size: of the whole dimension, where parts need not be equal; None: they are.
    """

    axis: str
    dim: int
    blocks: int = 1
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Say along which axes a parameter is cut, and along which there are copies, or shards, of each part.

    Args:
        stage: the axes of a stage on which such parameters lie: those of one view of the ranks.
        cuts: at most one along an axis.
        sharded_over: the axes without a cut along which the backend holds shards, in place of copies.
        is_at_both_ends: the first and the last stage of the pipeline hold it: words that are tied. The gradient is the
            sum of both. The norm counts the first one's, and files hold it.
    """

    stage: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()
    sharded_over: tuple[str, ...] = ()
    is_at_both_ends: bool = False

    @property
    def cut_over(self) -> tuple[str, ...]:
        """Axes along which ranks hold other parts."""
        return tuple(cut.axis for cut in self.cuts)

    @property
    def summed_over(self) -> tuple[str, ...]:
        """Axes over which gradients are summed: all of the stage along which the parameter is not cut."""
        return tuple(axis for axis in self.stage if axis not in self.cut_over)

    @property
    def copied_over(self) -> tuple[str, ...]:
        """Axes along which ranks hold the same numbers."""
        return tuple(axis for axis in self.summed_over if axis not in self.sharded_over)


DENSE = Placement(stage=DENSE_AXES)
# Matrices by heads or widths: a rank has rows (outputs) of the first, and of the next the columns (inputs) that fit.
TENSOR_ROWS = Placement(stage=DENSE_AXES, cuts=(Cut("tensor", 0),))
TENSOR_GATED_ROWS = Placement(stage=DENSE_AXES, cuts=(Cut("tensor", 0, blocks=2),))
TENSOR_COLUMNS = Placement(stage=DENSE_AXES, cuts=(Cut("tensor", 1),))
# Stacks of experts; (L, ...) on each rank.
EXPERT = Placement(stage=EXPERT_AXES, cuts=(Cut("expert", 0),))


def vocabulary_placement(num_words: int) -> Placement:
    """Place an embedding or output projection: the rows of words over tensor, as many on each rank as can be."""
    return Placement(stage=DENSE_AXES, cuts=(Cut("tensor", 0, size=num_words),))


def expert_placements(*, is_gated: bool, is_cut: bool) -> dict[str, Placement]:
    """List the placement of each stack of experts by its name.

    Args:
        is_gated: the first matrix has the rows of a gate, then those of what it opens.
        is_cut: each expert's width is divided over the ranks of ``expert_tensor``. The second bias is whole on all of
            them, and one of them adds it.
    """
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    if not is_cut:
        return dict.fromkeys(names, EXPERT)
    rows = Cut("expert_tensor", 1, blocks=2 if is_gated else 1)
    cuts = {
        "fc1_weight": (rows,),
        "fc1_bias": (rows,),
        "fc2_weight": (Cut("expert_tensor", 2),),
        "fc2_bias": (),
    }
    return {name: replace(EXPERT, cuts=(*EXPERT.cuts, *cuts[name])) for name in names}


# States are sharded over the ranks that hold the same parts of the same experts, or the same parts of all else. What is
# whole on tensor ranks, too, has a copy of each shard on every one of them.
EXPERT_SHARDS = ("expert_replica",)
DENSE_SHARDS = ("data", "context")

# The sets of axes along which some parameter has copies, or has them no more.
COPIED_OVER = tuple(
    dict.fromkeys(
        axes
        for placement in (
            DENSE,
            TENSOR_ROWS,
            EXPERT,
            *expert_placements(is_gated=True, is_cut=True).values(),
        )
        for axes in (
            placement.summed_over,
            tuple(axis for axis in placement.summed_over if axis not in (*DENSE_SHARDS, *EXPERT_SHARDS)),
        )
        if axes
    )
)


def marks_of(placement: Placement) -> dict[str, Any]:
    """List the attributes of a parameter of this placement: the record itself and, for experts, stock's mark.

    Stock fairseq knows ``expert`` alone, and looks whether it is there: legacy_ddp leaves such gradients out of its
    sum (distributed/legacy_distributed_data_parallel.py), FP16Optimizer hands the mark on to float32 copies, its own
    clip_grad_norm_ leaves them out of the norm, and fairseq-train logs their number apart.
    """
    return {_ATTRIBUTE: placement} | ({"expert": True} if "expert" in placement.cut_over else {})


def place(parameters: Iterable[Any], placement: Placement) -> None:
    """Write ``placement`` on every parameter; torch drops it where it makes new ones (copies, conversions, shards)."""
    for parameter in parameters:
        for name, value in marks_of(placement).items():
            setattr(parameter, name, value)


def shard(parameter: Any) -> None:
    """Note that the backend holds shards of a parameter, in place of copies, along the axes that are meant for that."""
    axes = EXPERT_SHARDS if is_expert(parameter) else DENSE_SHARDS
    place([parameter], replace(placement_of(parameter), sharded_over=axes))


def shard_dim(shape: Sequence[int], num_ranks: int) -> int:
    """Choose the dimension along which a tensor is divided: the first, unless only a later one divides evenly.

    Torch makes uneven parts along the first dimension alone. With one expert on two ranks the one would get all.
    """
    if shape[0] >= _MANY_ROWS * num_ranks:
        return 0
    return next((dim for dim, size in enumerate(shape) if size and size % num_ranks == 0), 0)


def placement_of(parameter: Any) -> Placement:
    """Read the placement written on a parameter; one without any is dense."""
    placement: Placement = getattr(parameter, _ATTRIBUTE, DENSE)
    return placement


def is_expert(parameter: Any) -> bool:
    """Tell whether a parameter belongs to experts: other ranks of the expert group hold other ones."""
    return "expert" in placement_of(parameter).cut_over


def num_copies(placement: Placement, ranks: RankGrid) -> int:
    """Count the ranks that hold the same numbers of a parameter, this one included."""
    return ranks.size(placement.copied_over)


def holds_first_copy(placement: Placement, ranks: RankGrid, rank: int) -> bool:
    """Tell whether ``rank`` is the one, among those that share a part of a parameter, that writes it into a file."""
    return all(ranks.coordinate(rank, axis) == 0 for axis in placement.summed_over)


def is_second_end(placement: Placement, ranks: RankGrid, rank: int) -> bool:
    """Tell whether ``rank`` holds what the first stage of its pipeline holds as well."""
    return placement.is_at_both_ends and ranks.pipe > 1 and ranks.coordinate(rank, "pipe") > 0


def gradient_divisor(placement: Placement, ranks: RankGrid) -> float:
    """Find what to divide a gradient by, so that it becomes what stock wants: the sum over copies by data ranks.

    Stock multiplies all gradients by data ranks / sample size afterwards. Where the backend shards, it has taken the
    mean over the shards' ranks already, in place of the sum.
    """
    return ranks.data / ranks.size(placement.sharded_over)
