"""Make a job of a command line and an environment, or say at once all that keeps it from being one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_moe.errors import ConfigError
from fairseq_moe.launch.checks import mount_of, secret_problems, setting_notes, setting_problems
from fairseq_moe.launch.command import environment_of, profile_of, run_name, training_command, uses_wandb
from fairseq_moe.launch.flag_checks import check_flags
from fairseq_moe.launch.job import Cluster, Container, Job
from fairseq_moe.launch.layers import Layered, collect
from fairseq_moe.launch.render.problems import render_problems
from fairseq_moe.launch.sizes import Sizes, sizes_of

__all__ = ["Resolution", "resolve", "resolve_all"]

_KEY = "WANDB_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Hold a job and where it comes from.

    Args:
        job: ready to be written down.
        layered: settings with the layer of each.
        notes: sentences that whoever starts it should read.
    """

    job: Job
    layered: Layered
    notes: tuple[str, ...]


def resolve(arguments: Sequence[str], environ: Mapping[str, str]) -> Job:
    """Make a job; see ``resolve_all``."""
    return resolve_all(arguments, environ).job


def resolve_all(arguments: Sequence[str], environ: Mapping[str, str]) -> Resolution:
    """Make a job, and say which layer gave each setting.

    Args:
        arguments: ``RECIPE key=value ... -- flags``, without the program's name.
        environ: the environment, with ModelZoo's variables.

    Raises:
        ConfigError: all that cannot be honoured, a sentence each.
    """
    layered = collect(arguments, environ)
    sizes, has_key = sizes_of(layered), bool(environ.get(_KEY))
    problems = setting_problems(layered, sizes, has_key=has_key)
    if layered["arch"] is None and problems:
        raise ConfigError(problems)  # there is no model whose flags could be looked at
    job = _job(layered, sizes, has_key=has_key)
    problems += secret_problems(layered, (*job.command, *job.env.values(), str(job.run_dir)), environ)
    problems += render_problems(job)
    told = check_flags(job.command[1:], num_ranks=sizes.num_ranks)
    if problems or told.problems:
        raise ConfigError([*problems, *told.problems])
    notes = (*layered.notes, *setting_notes(layered), *told.notes)
    return Resolution(job=job, layered=layered, notes=notes)


def _job(layered: Layered, sizes: Sizes, *, has_key: bool) -> Job:
    name = run_name(layered)
    run_dir = Path(layered["output_path"]).absolute() / name
    return Job(
        name=name,
        mode=layered["mode"],
        command=training_command(layered, sizes, run_dir=run_dir, has_key=has_key),
        run_dir=run_dir,
        env=environment_of(layered, sizes, name=name, has_key=has_key),
        secrets=layered["secrets"]
        if uses_wandb(layered, has_key=has_key)
        else _without_key(layered["secrets"]),
        num_nodes=layered["nodes"],
        ranks_per_node=sizes.ranks_per_node,
        cluster=_cluster(layered, sizes),
        container=_container(layered),
        profile=profile_of(layered, sizes),
        time_limit=layered["run_time"],
        lead_sec=layered["lead_sec"],
        requeue=bool(layered["requeue"]),
        max_restarts=layered["max_restarts"],
        chain=layered["chain"],
    )


def _without_key(secrets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in secrets if name != _KEY)


def _cluster(layered: Layered, sizes: Sizes) -> Cluster:
    named = layered["cluster"]
    return Cluster(
        name="none" if named is None else Path(named).stem,
        account=layered["account"],
        partition=layered["partition"],
        gpus_per_node=0 if sizes.on_cpu else layered["gpus_per_node"],
        cpus_per_task=layered["cpus_per_task"],
        segment=layered["segment"],
        srun_args=layered["srun_args"],
        sbatch_args=layered["sbatch_args"],
        setup=layered["setup"],
    )


def _container(layered: Layered) -> Container:
    return Container(
        kind=layered["container"],
        image=layered["container_image"],
        name=layered["container_name"],
        mounts=tuple(mount_of(text) for text in layered["container_mounts"]),
        workdir=layered["container_workdir"],
    )
