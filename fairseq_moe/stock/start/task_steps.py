"""Refuse a task with training or validation steps of its own where a pipeline would have to run inside them.

Micro-batches go through a pipeline in fairseq's own steps (``stock.step.pipelining``), which such a task replaces.
"""

from typing import Any

from fairseq.tasks import TASK_REGISTRY, FairseqTask

from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.flags.records import getter

__all__ = ["task_step_problems"]

_STEPS = ("train_step", "valid_step")


def task_step_problems(cfg: Any) -> list[str]:
    """List one sentence if layers are divided over ranks and the task computes its steps by itself.

    Args:
        cfg: a whole fairseq configuration.
    """
    model = getattr(cfg, "model", None)
    pipe = 1 if model is None else ParallelConfig.from_args(model).pipe
    name = getter(getattr(cfg, "task", None) or {})("_name")
    task = TASK_REGISTRY.get(name)
    if pipe == 1 or task is None:
        return []
    own = [step for step in _STEPS if getattr(task, step) is not getattr(FairseqTask, step)]
    if not own:
        return []
    return [
        f"--task {name} has a {own[0]} of its own, and with --pipeline-model-parallel-size {pipe} micro-batches go "
        "through the stages in fairseq's; use a task without one, such as language_modeling."
    ]
