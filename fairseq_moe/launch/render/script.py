"""Choose by its mode how a job is written down."""

from fairseq_moe.errors import ConfigError
from fairseq_moe.launch.job import Job
from fairseq_moe.launch.render.problems import render_problems
from fairseq_moe.launch.render.sbatch import sbatch_script
from fairseq_moe.launch.render.torchrun import interactive_script, local_script

__all__ = ["render"]

_SCRIPTS = {"sbatch": sbatch_script, "interactive": interactive_script, "local": local_script}


def render(job: Job) -> str:
    """Write a job down as a bash script: the text that a dry run prints and that is submitted.

    Raises:
        ConfigError: the job cannot be written down; all reasons at once.
    """
    problems = render_problems(job)
    if problems:
        raise ConfigError(problems)
    return "\n".join(_SCRIPTS[job.mode](job)) + "\n"
