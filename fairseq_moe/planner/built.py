"""Build the planned ranks of a run without memory, and compare their parameters with the plan's, to the number."""

from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from fairseq_moe.distributed.pretended import pretended_rank
from fairseq_moe.errors import MoEError
from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModel
from fairseq_moe.planner.held import held_by
from fairseq_moe.planner.parameters import stage_parts
from fairseq_moe.planner.reading import Job
from fairseq_moe.planner.table import text_table

__all__ = ["BuiltStage", "build_on_meta", "build_stages", "built_lines"]


@dataclass(frozen=True, kw_only=True)
class BuiltStage:
    """Hold what a stage's first rank computes with, before states are sharded.

    Args:
        rank: of all ranks.
        planned: number of parameters by the plan.
        built: the same of the model that this rank builds.
    """

    rank: int
    planned: int
    built: int


class _Words:
    def __init__(self, num_words: int, padding: int) -> None:
        self._num_words, self._padding = num_words, padding

    def __len__(self) -> int:
        return self._num_words

    def pad(self) -> int:
        return self._padding


def build_stages(job: Job) -> list[BuiltStage]:
    """Build the first rank of each stage on torch's meta device, which holds no numbers.

    Args:
        job: flags that were read.
    """
    grid, found = job.mapping.grid, []
    for pipe in range(grid.pipe):
        rank = pipe * grid.stage_size
        parts = stage_parts(job.shape, job.mapping, pipe)
        planned = held_by(parts, job.mapping, rank, sharded=False).total
        found.append(BuiltStage(rank=rank, planned=planned, built=_count_built(job, rank)))
    return found


def _count_built(job: Job, rank: int) -> int:
    args = Namespace(**vars(job.args))
    args.max_target_positions = args.tokens_per_sample  # as the task says when it has read the data
    with pretended_rank(rank, job.mapping.grid.world_size):
        model = build_on_meta(args, num_words=job.shape.num_words, padding=job.padding)
    return sum(parameter.numel() for parameter in model.parameters())


def build_on_meta(args: Namespace, *, num_words: int, padding: int) -> Any:
    """Build what this rank holds of a model, as fairseq's tasks do, on a device that holds no numbers.

    Args:
        args: flags of the model, with the architecture's values.
        num_words: V, of the dictionary.
        padding: number of its padding.
    """
    words = _Words(num_words, padding)
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    with torch.device("meta"):
        return MoETransformerLanguageModel.build_model(args, task)


def built_lines(job: Job) -> list[str]:
    """Write what was built beside what was planned.

    Raises:
        MoEError: they differ.
    """
    stages = build_stages(job)
    wrong = [stage for stage in stages if stage.planned != stage.built]
    if wrong:
        first = wrong[0]
        raise MoEError(
            f"rank {first.rank} builds {first.built:,} parameters, the plan says {first.planned:,}: this is a fault of "
            "the planner; please report it with the command."
        )
    rows = [(f"rank {stage.rank}", f"{stage.planned:,}", f"{stage.built:,}") for stage in stages]
    return ["Built without memory, parameters before sharding", *text_table(("", "planned", "built"), rows)]
