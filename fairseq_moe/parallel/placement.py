"""How a parameter lies on the ranks: the axes over which it is cut, and those over which it has copies.

Axes are those of the two views of the ranks in ``distributed.mesh``. A gradient is whole once it has been summed
over the copies of its parameter, so the entry of a parameter says who sums it, by what it is divided, and how
often the norm meets it. Two entries are all there is with data and expert parallelism; a further kind of
parallelism adds axes and entries here, and no question elsewhere. No tensor and no process group is touched.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from fairseq_moe.parallel.experts import ExpertLayout

__all__ = [
    "DENSE",
    "EXPERT",
    "Placement",
    "gradient_divisor",
    "is_expert",
    "marks_of",
    "num_copies",
    "place",
    "placement_of",
]

_ATTRIBUTE = "placement"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Say over which axes a parameter is cut, and over which there are copies of each part.

    A rank's part has a copy on every rank that differs from it in the axes of ``copied_over`` alone.
    """

    cut_over: tuple[str, ...]
    copied_over: tuple[str, ...]


DENSE = Placement(cut_over=(), copied_over=("data",))
EXPERT = Placement(cut_over=("expert",), copied_over=("expert_replica",))


def marks_of(placement: Placement) -> dict[str, Any]:
    """List the attributes of a parameter of this placement: the record itself and, for experts, stock's mark.

    Stock fairseq knows ``expert`` alone, and looks whether it is there: legacy_ddp leaves such gradients out of its
    sum (distributed/legacy_distributed_data_parallel.py), FP16Optimizer hands the mark on to float32 copies, its own
    clip_grad_norm_ leaves them out of the norm, and fairseq-train logs their number apart.
    """
    return {_ATTRIBUTE: placement} | ({"expert": True} if "expert" in placement.cut_over else {})


def place(parameters: Iterable[Any], placement: Placement) -> None:
    """Write ``placement`` on every parameter; torch drops it where it makes new ones (copies, conversions, FSDP)."""
    for parameter in parameters:
        for name, value in marks_of(placement).items():
            setattr(parameter, name, value)


def placement_of(parameter: Any) -> Placement:
    """Read the placement written on a parameter; one without any is dense."""
    placement: Placement = getattr(parameter, _ATTRIBUTE, DENSE)
    return placement


def is_expert(parameter: Any) -> bool:
    """Tell whether a parameter belongs to experts: other ranks of the expert group hold other ones."""
    return "expert" in placement_of(parameter).cut_over


def _axis_sizes(layout: ExpertLayout) -> dict[str, int]:
    return {"data": layout.world_size, "expert": layout.ep_size, "expert_replica": layout.num_replicas}


def num_copies(placement: Placement, layout: ExpertLayout) -> int:
    """Count the ranks that hold the same part of a parameter, this one included."""
    sizes = _axis_sizes(layout)
    return prod(sizes[axis] for axis in placement.copied_over)


def gradient_divisor(placement: Placement, layout: ExpertLayout, *, is_averaged: bool) -> float:
    """Find what to divide a gradient by, so that it becomes what stock wants: the sum over copies by data ranks.

    Stock multiplies all gradients by data ranks / sample size afterwards.

    Args:
        placement: of the parameter.
        layout: of the ranks.
        is_averaged: the backend has taken the mean over the copies already, in place of the sum.
    """
    return _axis_sizes(layout)["data"] / (num_copies(placement, layout) if is_averaged else 1)
