"""Jobs that tests write down: one for each mode and container, and some with all that a job can ask for."""

from dataclasses import replace
from pathlib import Path

from fairseq_moe.launch.job import Cluster, Container, Job, Profile

__all__ = ["MODES_AND_CONTAINERS", "golden_jobs", "plain_job"]

MODES_AND_CONTAINERS = (
    *(("sbatch", kind) for kind in ("none", "pyxis", "apptainer")),
    *(("interactive", kind) for kind in ("none", "apptainer", "docker")),
    *(("local", kind) for kind in ("none", "apptainer", "docker")),
)
_COMMAND = ("fairseq-train", "/data/my text", "--user-dir", "fairseq_moe", "--adam-betas", "(0.9, 0.98)")
_CLUSTER = Cluster(
    name="here",
    account="team",
    partition="gpu",
    gpus_per_node=4,
    cpus_per_task=12,
    segment=2,
    srun_args=("--cpu-bind=cores",),
    sbatch_args=("--qos=high", "--comment=it's a run"),
    setup=("module load cuda",),
)


def plain_job(mode: str, kind: str, run_dir: Path, command: tuple[str, ...] = _COMMAND) -> Job:
    """Make a job of two ranks on one node, without a wish beyond its mode and container."""
    container = Container(kind=kind, image="image", mounts=(("/outside", "/in"),))  # type: ignore[arg-type]
    if kind == "none":
        container = Container()
    return Job(
        name="tiny", mode=mode, command=command, run_dir=run_dir, ranks_per_node=2, container=container
    )  # type: ignore[arg-type]


def golden_jobs() -> dict[str, Job]:
    """List jobs by the name of their golden script."""
    jobs = {}
    for mode, kind in MODES_AND_CONTAINERS:
        job = plain_job(mode, kind, Path("/runs/tiny"))
        job = replace(job, env={"NCCL_DEBUG": "WARN", "NOTE": 'it\'s "quoted" $HOME'}, cluster=_CLUSTER)
        if mode != "local":
            job = replace(job, num_nodes=2, ranks_per_node=4)
        if kind != "none":
            job = replace(job, container=replace(job.container, workdir="/in/work"))
        jobs[f"{mode}-{kind}"] = job
    nsys = Profile(profiler="nsys", ranks=(0, 5))
    first = jobs["sbatch-none"]
    jobs["sbatch-none-requeue"] = replace(first, time_limit="1-04:00:00", requeue=True, chain=3)
    jobs["sbatch-none-nsys"] = replace(first, profile=nsys)
    jobs["sbatch-pyxis-nsys"] = replace(jobs["sbatch-pyxis"], profile=nsys)
    jobs["sbatch-none-nsys-without-gpus"] = replace(
        first, profile=nsys, cluster=replace(_CLUSTER, gpus_per_node=0)
    )
    jobs["interactive-none-nsys"] = replace(jobs["interactive-none"], profile=nsys)
    jobs["interactive-none-one-node"] = replace(jobs["interactive-none"], num_nodes=1, cluster=Cluster())
    jobs["local-none-nsys"] = replace(jobs["local-none"], profile=Profile(profiler="nsys"))
    own_ranks = (*_COMMAND, "--cpu", "--distributed-world-size", "2")
    jobs["local-none-own-ranks"] = replace(jobs["local-none"], command=own_ranks)
    return jobs
