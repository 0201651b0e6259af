"""Parse a training command as the ranks will, and say what they would say about it, before anything is submitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_moe.errors import ConfigError

__all__ = ["Told", "check_flags"]


@dataclass(frozen=True, kw_only=True)
class Told:
    """Hold what ranks would say of a command.

    Args:
        problems: why they would not start, a sentence each.
        notes: what does nothing, or other than it seems to.
    """

    problems: list[str]
    notes: list[str]


def check_flags(argv: Sequence[str], *, num_ranks: int) -> Told:
    """Parse and check flags of fairseq-train, for ranks that may have other devices than this machine.

    Args:
        argv: without the program's name.
        num_ranks: that will take part.
    """
    from fairseq_moe.flags.megatron_aliases import argument_warnings
    from fairseq_moe.flags.parallel_checks import parallel_notes
    from fairseq_moe.flags.pipeline_checks import pipeline_notes
    from fairseq_moe.planner.parsing import configured, parsed

    try:
        cfg = configured(parsed(argv))
    except ConfigError as error:
        return Told(problems=[f"fairseq-train would say: {problem}" for problem in error.problems], notes=[])
    problems = _problems(cfg, num_ranks)
    if problems:
        return Told(problems=problems, notes=[])
    notes = [*argument_warnings(cfg.model), *parallel_notes(cfg.model), *pipeline_notes(cfg)]
    return Told(problems=[], notes=notes)


def _problems(cfg: Any, num_ranks: int) -> list[str]:
    from omegaconf import open_dict

    from fairseq_moe.criterions.best_metric import best_metric_problems
    from fairseq_moe.flags.moe_checks import moe_problems
    from fairseq_moe.stock.start.other_models import other_model_problems
    from fairseq_moe.stock.start.task_steps import task_step_problems

    found: list[str] = []
    if getattr(cfg.model, "moe_fp8", None) == "native" and not cfg.common.cpu:
        # Which GPU this machine has says nothing about the ranks', which look at their own when they start.
        found += _fp8_widths(cfg)
        with open_dict(cfg):
            cfg.model.moe_fp8 = "emulate"
    cfg.distributed_training.distributed_world_size = num_ranks
    others: list[str] = other_model_problems(cfg)
    return others or [
        *found,
        *moe_problems(cfg, world_size=num_ranks),
        *best_metric_problems(cfg),
        *task_step_problems(cfg),
        *_schedule_problems(cfg),
    ]


def _schedule_problems(cfg: Any) -> list[str]:
    """Refuse a cosine without a period: stock divides by what training leaves after the warm-up."""
    schedule, max_update = cfg.lr_scheduler, cfg.optimization.max_update
    if schedule._name != "cosine" or schedule.lr_period_updates > 0 or max_update > schedule.warmup_updates:
        return []
    return [
        f"--lr-scheduler cosine has no updates left: --max-update is {max_update}, --warmup-updates "
        f"{schedule.warmup_updates}; train longer, warm up for less, or give --lr-period-updates."
    ]


def _fp8_widths(cfg: Any) -> list[str]:
    from fairseq_moe.flags.moe import MoEConfig
    from fairseq_moe.modules.kernels.fp8 import width_problem

    moe = MoEConfig.from_args(cfg.model)
    width = moe.expert_dim or cfg.model.decoder_ffn_embed_dim
    problem = width_problem(cfg.model.decoder_embed_dim, width // max(moe.axes.expert_tensor, 1))
    return (
        []
        if problem is None
        else [f"--moe-fp8 native cannot be honoured: {problem}; take another precision."]
    )
