"""Hold a job that is ready to be written down: what is run, on how many ranks, where, for how long."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["Cluster", "Container", "Job", "Mode", "Profile"]

Mode = Literal["sbatch", "interactive", "local"]
ContainerKind = Literal["none", "pyxis", "apptainer", "docker"]
Profiler = Literal["none", "nsys", "torch"]


@dataclass(frozen=True, kw_only=True)
class Container:
    """Describe the container that ranks run in.

    Args:
        kind: ``none`` runs on the machine itself.
        image: a path or a name that the kind understands.
        name: of a container that pyxis keeps.
        mounts: ``(outside, inside)`` paths.
        workdir: where the command starts, inside.
    """

    kind: ContainerKind = "none"
    image: str | None = None
    name: str | None = None
    mounts: tuple[tuple[str, str], ...] = ()
    workdir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Describe where a job runs.

    Args:
        name: of the cluster's file.
        account, partition: of SLURM; None leaves the site's default.
        gpus_per_node: 0 on CPUs.
        cpus_per_task: None leaves the site's default.
        segment: nodes that must lie together, as SLURM's --segment; None asks for nothing.
        srun_args: further ones, a word each.
        sbatch_args: further ones, a word each (``--qos=high``).
        setup: lines of the job script before the command, as the cluster's file has them (``module load cuda``).
    """

    name: str = "none"
    account: str | None = None
    partition: str | None = None
    gpus_per_node: int = 8
    cpus_per_task: int | None = None
    segment: int | None = None
    srun_args: tuple[str, ...] = ()
    sbatch_args: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Describe what is profiled.

    Args:
        profiler: ``nsys`` wraps the command; ``torch`` is asked for by flags of the command.
        first_step, last_step: updates, both counted.
        ranks: which of them.
    """

    profiler: Profiler = "none"
    first_step: int = 10
    last_step: int = 11
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe one run of training, ready to be written down as a script.

    Args:
        name: of the run, without a date: it names the run directory too, so that a resume finds it.
        mode: sbatch (one task a rank), interactive (torchrun), local (gloo on CPUs).
        command: words of the training command, the program first, all flags included.
        env: variables that every rank gets. Keys are never among them.
        secrets: names of variables that ranks inherit from the submitter's environment, never written anywhere.
        num_nodes: machines.
        ranks_per_node: processes on each.
        cluster, container, profile: where, in what, and what is measured.
        run_dir: the run's directory: scripts, logs, checkpoints (``run_dir/checkpoints``), reports.
        time_limit: SLURM's ``D-HH:MM:SS`` or ``HH:MM:SS``; None leaves the partition's.
        lead_sec: how long before the limit SLURM sends TERM, so that a save fits.
        requeue: whether a job that was ended by its limit starts again after a good save.
        max_restarts: how often at most.
        chain: how many jobs are submitted, each after the one before.
    """

    name: str
    mode: Mode
    command: tuple[str, ...]
    run_dir: Path
    env: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ("WANDB_API_KEY",)
    num_nodes: int = 1
    ranks_per_node: int = 1
    cluster: Cluster = Cluster()
    container: Container = Container()
    profile: Profile = Profile()
    time_limit: str | None = None
    lead_sec: int = 600
    requeue: bool = False
    max_restarts: int = 3
    chain: int = 1

    @property
    def num_ranks(self) -> int:
        """Count the processes on all nodes."""
        return self.num_nodes * self.ranks_per_node
