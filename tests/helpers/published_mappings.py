"""Describe published models spread over ranks, without fairseq's parser: sizes of presets, and mappings of grids."""

from argparse import Namespace
from typing import Any

from fairseq_moe.models.presets import PRESETS
from fairseq_moe.parallel.ranks import RankGrid
from fairseq_moe.planner.mapping import Mapping, States
from fairseq_moe.planner.shape import ModelShape, shape_of

__all__ = ["LENGTH", "mapping", "shape"]

LENGTH = 4096


def shape(name: str, *, num_words: int | None = None, **changes: Any) -> ModelShape:
    """Read a preset's sizes, without fairseq's parser."""
    preset = PRESETS[name]
    args = Namespace(tokens_per_sample=LENGTH, **changes)
    preset.apply_to_command(args)
    return shape_of(args, num_words=num_words or preset.vocab_size, padding_index=0)


def mapping(
    ranks: int, *, pipe: int = 1, virtual: int = 1, expert: int = 1, tensor: int = 1, parts: int = 1,
    micro_batches: int = 1, recompute: frozenset[str] = frozenset(), last: int | None = None, first: int | None = None,
) -> Mapping:  # fmt: skip
    """Spread a model over ranks, with micro-batches of one sequence."""
    grid = RankGrid(
        data=ranks // (pipe * tensor), pipe=pipe, tensor=tensor, expert=expert, expert_tensor=parts
    )
    return Mapping(
        grid=grid, virtual=virtual, first=first, last=last, states=States.ZERO_1, sequences=1, length=LENGTH,
        micro_batches=micro_batches, recompute=recompute, dispatcher="alltoall",
    )  # fmt: skip
