"""Refuse pipelines that flags ask for and that cannot be, one sentence per reason; warn of pipelines that idle."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.flags.sharding import ShardingConfig
from fairseq_moe.parallel.schedule import bubble_frac, with_dummies

__all__ = ["pipeline_notes", "pipeline_problems"]

# They call the model once, with a batch's own input, and read nothing of it but the output of the last stage.
_CRITERIONS = (None, "moe_cross_entropy", "cross_entropy", "label_smoothed_cross_entropy")


def pipeline_problems(cfg: Any, moe: MoEConfig) -> list[str]:
    """List one sentence per reason why layers cannot be divided over ranks as the flags ask.

    What holds for all ranks that share micro-batches, and whether there are as many ranks, is not looked at here.
    Stages without anything to train are not possible: each has a layer, and attention is never frozen.

    Args:
        cfg: a whole fairseq configuration.
        moe: the model's flags about experts, which are part of it.
    """
    parallel = moe.parallel
    problem = parallel.stage_problem(moe.decoder_layers)
    found = [] if problem is None else [problem]
    if parallel.pipe == 1:
        return found
    name = f"--pipeline-model-parallel-size {parallel.pipe}"
    criterion = getattr(getattr(cfg, "criterion", None), "_name", None)
    if criterion not in _CRITERIONS and not parallel.splits_batches:
        found.append(
            f"--criterion {criterion} may ask a model for more than its output, which is all that a last stage has "
            f"with {name}; use --criterion moe_cross_entropy."
        )
    optimizer = getattr(getattr(cfg, "optimizer", None), "_name", None)
    is_cut = max(moe.axes.tensor, moe.axes.expert_tensor) > 1 or ShardingConfig.from_args(cfg.model).wanted
    if optimizer == "fused_lamb" and not is_cut:  # where tensors are cut, it is refused anyway
        found.append(
            f"--optimizer fused_lamb clips gradients by the norm of those of its rank, which is another one on each "
            f"stage with {name}; choose lamb, adam or another one that does not clip by itself."
        )
    return found


def pipeline_notes(cfg: Any) -> Iterator[str]:
    """Say, one sentence each, which numbers of micro-batches leave stages of a pipeline idle.

    Args:
        cfg: a whole fairseq configuration, of which nothing is refused.
    """
    parallel = ParallelConfig.from_args(cfg.model)
    pipe = parallel.pipe
    if pipe == 1:
        return
    virtual = parallel.stages(int(cfg.model.decoder_layers)).virtual
    counts = sorted({int(count) for count in cfg.optimization.update_freq})
    name = f"--pipeline-model-parallel-size {pipe}"
    few = [count for count in counts if count < pipe]
    if few:
        yield (
            f"--update-freq {few[0]} gives {name} fewer micro-batches than stages, and each rank idles "
            f"{_idle_frac(pipe, virtual, few[0]):.0%} of an update; raise it to several times {pipe}."
        )
    for count in counts:
        filled = with_dummies(pipe, virtual, count)
        if filled > count > pipe:
            yield (
                f"--update-freq {count} is no multiple of {name}, which several stages on each rank need: it is "
                f"filled up to {filled} by micro-batches without words; make it a multiple."
            )


def _idle_frac(pipe: int, virtual: int, num_micro_batches: int) -> float:
    """Give the share of its time that a rank idles, or computes what fills up the schedule."""
    run = with_dummies(pipe, virtual, num_micro_batches)
    return float(1 - (1 - bubble_frac(pipe, virtual, run)) * Fraction(num_micro_batches, run))
