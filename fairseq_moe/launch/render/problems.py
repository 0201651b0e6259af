"""Say why a job cannot be written down, in sentences, all at once."""

import re
from collections.abc import Iterator

from fairseq_moe.launch.job import Job

__all__ = ["render_problems"]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d\d):(\d\d)")
_LONGEST_NAME_BYTES = 255  # of Linux's file systems
_LONGEST_LEAD_SEC = 65535  # of sbatch's --signal
_CONTAINERS = {
    "sbatch": ("none", "pyxis", "apptainer"),
    "interactive": ("none", "apptainer", "docker"),
    "local": ("none", "apptainer", "docker"),
}


def render_problems(job: Job) -> list[str]:
    """List what keeps a job from being written down, a sentence each."""
    return [*_words(job), *_ranks(job), *_container(job), *_time(job), *_profile(job)]


def _words(job: Job) -> Iterator[str]:
    if not job.command:
        yield "the job has no command; give the training program and its flags."
    if not re.fullmatch(r"[^/\x00-\x1f]+", job.name) or job.name in (".", ".."):
        yield f"the run's name is {job.name!r}, expected one line without '/'; it names a directory."
    elif (num_bytes := len(job.name.encode(errors="surrogateescape"))) > _LONGEST_NAME_BYTES:
        yield (
            f"the run's name has {num_bytes} bytes, expected at most {_LONGEST_NAME_BYTES}: it names a directory; "
            "give run_name."
        )
    if not job.run_dir.is_absolute():
        yield f"the run directory is {str(job.run_dir)!r}, expected a path from the root: ranks start elsewhere."
    for name in job.env:
        if not _VARIABLE.fullmatch(name):
            yield f"env has {name!r}, expected the name of a variable."
        if name in job.secrets:
            yield f"env has a value of {name}, which is a secret; leave it to the environment that submits."
    for name in job.secrets:
        if not _VARIABLE.fullmatch(name):
            yield f"secrets has {name!r}, expected the name of a variable."
    for word in (*job.command, *job.env.values(), *job.cluster.srun_args, str(job.run_dir)):
        if "\0" in word:
            yield f"the word {word!r} holds a zero byte, which no command line can carry."
        if re.search(r"[\ud800-\udfff]", word):  # how Python holds bytes that are no text
            yield f"the word {word!r} is not UTF-8, in which the script is written; spell it otherwise."
    cluster = job.cluster
    for word in (cluster.account or "", cluster.partition or "", *cluster.sbatch_args, str(job.run_dir)):
        if re.search(r"[\x01-\x1f]", word):
            yield f"{word!r} holds a line break or another control character, and #SBATCH lines are one line each."
    if job.mode == "sbatch" and "\\" in str(job.run_dir):
        yield f"the run directory {str(job.run_dir)!r} holds a backslash, which sbatch's --output reads otherwise."


def _ranks(job: Job) -> Iterator[str]:
    for name, number in (
        ("nodes", job.num_nodes),
        ("ranks per node", job.ranks_per_node),
        ("jobs", job.chain),
    ):
        if number < 1:
            yield f"the number of {name} is {number}, expected at least 1."
    gpus = job.cluster.gpus_per_node
    if job.mode == "local" and job.num_nodes > 1:
        yield f"mode local runs on this machine alone, but {job.num_nodes} nodes are asked for; use interactive."
    if job.mode != "local" and 0 < gpus < job.ranks_per_node:
        yield f"{job.ranks_per_node} ranks per node are asked for, but the cluster's nodes have {gpus} GPUs."
    segment = job.cluster.segment
    if job.mode == "sbatch" and segment is not None and (segment < 1 or job.num_nodes % segment):
        yield f"the segment is {segment} nodes, expected a divisor of the {job.num_nodes} nodes."


def _container(job: Job) -> Iterator[str]:
    container, kinds = job.container, _CONTAINERS[job.mode]
    if container.kind not in kinds:
        yield f"the container is {container.kind}, which mode {job.mode} cannot start; it can: {', '.join(kinds)}."
    if container.kind == "none":
        return
    if container.image is None and not (container.kind == "pyxis" and container.name):
        yield f"the container is {container.kind}, but no image is named; give one."
    for path in (*(path for mount in container.mounts for path in mount), str(job.run_dir)):
        if re.search("[,:]", path):
            yield f"{path!r} is to be mounted, and a comma or colon in a path reads as its end; link it elsewhere."
        elif not path.startswith("/"):
            yield f"{path!r} is to be mounted, expected a path from the root."


def _time(job: Job) -> Iterator[str]:
    if not 1 <= job.lead_sec <= _LONGEST_LEAD_SEC:
        yield f"lead_sec is {job.lead_sec}, expected 1 to {_LONGEST_LEAD_SEC}, which is what sbatch takes."
    if job.max_restarts < 0:
        yield f"max_restarts is {job.max_restarts}, expected 0 or more."
    if job.mode != "sbatch" and (job.requeue or job.chain > 1):
        yield f"mode {job.mode} has no queue, so neither requeue nor chain can be honoured; use sbatch."
    if job.time_limit is None:
        return
    found = _TIME.fullmatch(job.time_limit)
    if found is None:
        yield f"the time limit is {job.time_limit!r}, expected HH:MM:SS or D-HH:MM:SS."
        return
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    limit_sec = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if job.mode == "sbatch" and limit_sec <= job.lead_sec:
        yield f"the time limit {job.time_limit} is over when the save should begin, {job.lead_sec} s before it."


def _profile(job: Job) -> Iterator[str]:
    profile = job.profile
    if profile.profiler == "none":
        return
    if not 1 <= profile.first_step <= profile.last_step:
        yield f"updates {profile.first_step} to {profile.last_step} are to be profiled, expected 1 or more, in order."
    if not profile.ranks:
        yield "a profile is asked for, of no rank; name some."
    for rank in profile.ranks:
        if not 0 <= rank < job.num_ranks:
            yield f"rank {rank} is to be profiled, and ranks are 0 to {job.num_ranks - 1}."
