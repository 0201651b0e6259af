"""Declare the flags of tensor, sequence, context and pipeline parallelism, and say over which ranks experts are spread.

Names and meaning are Megatron's. What is refused is in ``parallel_checks`` and ``pipeline_checks``; ranks and stages
themselves are numbered in ``fairseq_moe.parallel``.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.megatron import MegatronConfig
from fairseq_moe.flags.records import Group, flag, given_fields
from fairseq_moe.parallel.stages import StageLayout, stage_problem, virtual_stages

__all__ = ["Axes", "ParallelConfig", "resolve_axes"]

_flag = functools.partial(flag, Group.PARALLEL)


class Axes(NamedTuple):
    """Number of ranks along each axis; the data ranks are what is left of the world.

    Args:
        ep_size: E, ranks over which the experts are spread; None: as many as there can be.
        expert_tensor: X, ranks over which the width of each expert is divided.
        tensor: T, ranks over which heads, dense widths and words are divided.
        context: C, ranks over which sequences are divided.
        pipe: P, ranks over which layers are divided.
    """

    ep_size: int | None = None
    expert_tensor: int = 1
    tensor: int = 1
    context: int = 1
    pipe: int = 1


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Hold the flags about axes along which ranks share micro-batches; None means that one was not given."""

    tensor_model_parallel_size: int | None = _flag(
        None,
        "ranks over which attention heads, dense networks and the vocabulary are divided; needs --sequence-parallel "
        "(default: 1)",
    )
    sequence_parallel: bool = _flag(
        False, "between blocks each tensor rank has tokens of its own: norms, routers, dropout, experts"
    )
    context_parallel_size: int | None = _flag(
        None, "ranks over which each sequence is divided, in halves of equal work (default: 1)"
    )
    pipeline_model_parallel_size: int | None = _flag(
        None,
        "ranks over which the decoder layers are divided, as stages of a pipeline; an update's micro-batches, "
        "--update-freq, go through it one behind the other (default: 1)",
    )
    num_layers_per_virtual_pipeline_stage: int | None = _flag(
        None,
        "each pipeline rank holds several stages of so many layers, which micro-batches reach in turns: less idling, "
        "more messages (default: one stage with all of its layers)",
    )
    num_virtual_stages_per_pipeline_rank: int | None = _flag(
        None, "the same, by the number of stages of each pipeline rank (default: 1)"
    )
    decoder_first_pipeline_num_layers: int | None = _flag(
        None, "layers of the first pipeline rank, over all of its stages (default: as many as the others)"
    )
    decoder_last_pipeline_num_layers: int | None = _flag(
        None, "layers of the last pipeline rank, over all of its stages (default: as many as the others)"
    )
    cp_comm_type: str | None = _flag(
        None, "how context ranks see each other's keys and values: all_gather (default)"
    )
    tp_comm_overlap: bool = _flag(False, "does nothing by itself: a line at the start says why")
    moe_extended_tp: bool = _flag(
        False,
        "divide the width of each expert over --tensor-model-parallel-size x --expert-model-parallel-size (here "
        "1 unless given) ranks, which hold parts of all experts",
    )
    moe_extended_ep: bool = _flag(
        False,
        "spread whole experts over --tensor-model-parallel-size x --expert-model-parallel-size ranks (without the "
        "latter: over as many as there can be)",
    )

    @classmethod
    def from_args(cls, args: Any) -> "ParallelConfig":
        """Read the fields that ``args`` (a namespace, config or mapping) has."""
        return cls(**given_fields(cls, args))

    @property
    def tensor(self) -> int:
        """Return T, the tensor ranks."""
        return 1 if self.tensor_model_parallel_size is None else self.tensor_model_parallel_size

    @property
    def context(self) -> int:
        """Return C, the context ranks."""
        return 1 if self.context_parallel_size is None else self.context_parallel_size

    @property
    def pipe(self) -> int:
        """Return P, the pipeline ranks."""
        return 1 if self.pipeline_model_parallel_size is None else self.pipeline_model_parallel_size

    @property
    def splits_batches(self) -> bool:
        """Tell whether several ranks have a part each of the positions or heads of a micro-batch."""
        return self.tensor > 1 or self.context > 1

    @property
    def num_batch_ranks(self) -> int:
        """Number of ranks that work on each micro-batch, on parts of it or in other layers: P C T."""
        return self.pipe * self.context * self.tensor

    @property
    def shares_batches(self) -> bool:
        """Tell whether several ranks work on each micro-batch."""
        return self.num_batch_ranks > 1

    def stage_problem(self, num_layers: int) -> str | None:
        """Say in one sentence why decoder layers cannot be spread over the pipeline so; None if they can."""
        return stage_problem(
            num_layers=num_layers,
            pipe=self.pipe,
            virtual=self.num_virtual_stages_per_pipeline_rank,
            layers_per_stage=self.num_layers_per_virtual_pipeline_stage,
            first=self.decoder_first_pipeline_num_layers,
            last=self.decoder_last_pipeline_num_layers,
        )

    def stages(self, num_layers: int) -> StageLayout:
        """Spread decoder layers over the pipeline.

        Raises:
            ConfigError: they cannot be spread so.
        """
        problem = self.stage_problem(num_layers)
        if problem is not None:
            raise ConfigError([problem])
        virtual = self.num_virtual_stages_per_pipeline_rank or 1
        if self.num_layers_per_virtual_pipeline_stage is not None:
            virtual = virtual_stages(
                num_layers=num_layers,
                pipe=self.pipe,
                layers_per_stage=self.num_layers_per_virtual_pipeline_stage,
            )
        return StageLayout(
            num_layers=num_layers,
            pipe=self.pipe,
            virtual=virtual,
            first=self.decoder_first_pipeline_num_layers,
            last=self.decoder_last_pipeline_num_layers,
        )

    def extends_nothing(self, megatron: MegatronConfig) -> bool:
        """Tell whether extended parallelism is asked for and comes to what there is without it.

        Args:
            megatron: the flags that say over how many ranks experts are spread.
        """
        if self.moe_extended_tp:
            return self.tensor * (megatron.expert_model_parallel_size or 1) == 1
        return self.moe_extended_ep and self.tensor == 1


def resolve_axes(parallel: ParallelConfig, megatron: MegatronConfig) -> Axes:
    """Work out the sizes of all axes, as Megatron does.

    An expert's width is divided over as many ranks as all other widths (X = T), unless said otherwise; with the moe
    branch's gates it stays whole. With --moe-extended-tp tensor and expert ranks together divide each expert: X = T
    times the given E, or T where none is given, and E = 1. With --moe-extended-ep they hold whole experts: X = 1, and
    E = T times the given E, or as many as there can be where none is given.

    Args:
        parallel: the axes along which ranks share micro-batches.
        megatron: over how many ranks experts are spread and divided.
    """
    given = megatron.expert_model_parallel_size
    tensor, context, pipe = parallel.tensor, parallel.context, parallel.pipe
    if parallel.moe_extended_tp and not parallel.extends_nothing(megatron):
        return Axes(ep_size=1, expert_tensor=tensor * (given or 1), tensor=tensor, context=context, pipe=pipe)
    if parallel.moe_extended_ep:
        ep_size = None if given is None else tensor * given
        return Axes(ep_size=ep_size, tensor=tensor, context=context, pipe=pipe)
    default = tensor if megatron.selected else 1
    parts = megatron.expert_tensor_parallel_size
    return Axes(
        ep_size=given,
        expert_tensor=default if parts is None else parts,
        tensor=tensor,
        context=context,
        pipe=pipe,
    )
