"""Write what puts a command into a container: flags of srun, or words in front of the command."""

import shlex

from fairseq_moe.launch.job import Job
from fairseq_moe.launch.render.in_rank import has_gpus
from fairseq_moe.launch.render.words import exports

__all__ = ["container_exports", "container_words", "outside_path", "srun_flags"]


def srun_flags(job: Job) -> list[str]:
    """Write the flags of srun that pyxis reads, quoted; none for other containers."""
    container = job.container
    if container.kind != "pyxis":
        return []
    flags = ["--no-container-mount-home"]
    if container.image is not None:
        flags.append(f"--container-image={container.image}")
    if container.name is not None:
        flags.append(f"--container-name={container.name}")
    flags.append("--container-mounts=" + ",".join(f"{outside}:{inside}" for outside, inside in _mounts(job)))
    if container.workdir is not None:
        flags.append(f"--container-workdir={container.workdir}")
    if job.env:
        flags.append(f"--container-env={','.join(job.env)}")  # or the image's own values win
    return [shlex.quote(flag) for flag in flags]


def container_words(job: Job) -> list[str]:
    """Write the words in front of a command that start it in a container, quoted; none where nothing is needed."""
    writers = {"apptainer": _apptainer, "docker": _docker}
    return writers[job.container.kind](job) if job.container.kind in writers else []


def _apptainer(job: Job) -> list[str]:
    words = ["apptainer", "exec", *(["--nv"] if has_gpus(job) else []), "--no-home"]
    words += [word for outside, inside in _mounts(job) for word in ("--bind", f"{outside}:{inside}")]
    words += ["--pwd", job.container.workdir] if job.container.workdir is not None else []
    return [shlex.quote(word) for word in (*words, job.container.image or "")]


def _docker(job: Job) -> list[str]:
    words = ["docker", "run", "--rm", "--init", "--network=host", "--ipc=host", "--ulimit=memlock=-1"]
    words += ["--gpus=all"] if has_gpus(job) else []
    words += [word for outside, inside in _mounts(job) for word in ("--volume", f"{outside}:{inside}")]
    words += ["--workdir", job.container.workdir] if job.container.workdir is not None else []
    # A name without a value is inherited, so that no value is written down.
    words += [word for name in (*job.env, *job.secrets) for word in ("--env", name)]
    # Files in the run directory belong to who runs this; such a user has no home inside.
    user = [
        "--user",
        '"$(id -u):$(id -g)"',
        "--env",
        "USER",
        *([] if "HOME" in job.env else ["--env", "HOME=/tmp"]),
    ]
    return [*(shlex.quote(word) for word in words), *user, shlex.quote(job.container.image or "")]


def container_exports(job: Job) -> list[str]:
    """Write lines that let a job's variables win over those of an apptainer image."""
    if job.container.kind != "apptainer":
        return []
    return exports({f"APPTAINERENV_{name}": value for name, value in job.env.items()})


def outside_path(job: Job, inside: str) -> str:
    """Find where a path of the container lies on the machine; without a mount that covers it, the path itself."""
    if job.container.kind == "none":
        return inside
    for source, target in sorted(_mounts(job), key=lambda mount: -len(mount[1])):
        if inside == target or inside.startswith(target.rstrip("/") + "/"):
            return source.rstrip("/") + inside.removeprefix(target.rstrip("/"))
    return inside


def _mounts(job: Job) -> tuple[tuple[str, str], ...]:
    """List mounts; the run directory is one, under its own name."""
    run_dir = str(job.run_dir)
    return (
        *job.container.mounts,
        *(() if (run_dir, run_dir) in job.container.mounts else ((run_dir, run_dir),)),
    )
