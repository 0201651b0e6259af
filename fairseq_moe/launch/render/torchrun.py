"""Write scripts that run here: torchrun on each of one or several nodes, or ranks of this machine's CPUs."""

from dataclasses import replace

from fairseq_moe.launch.job import Job
from fairseq_moe.launch.render.containers import container_exports, container_words
from fairseq_moe.launch.render.in_rank import in_rank, profile_without_gpus
from fairseq_moe.launch.render.words import command_array, exports, flag_value, quoted

__all__ = ["interactive_script", "local_script"]

_RENDEZVOUS_OF_NODES = """\
missing=
for name in NODE_RANK MASTER_ADDR MASTER_PORT; do
  [[ -n "${!name:-}" ]] || missing+=" $name"
done
if [[ -n "$missing" ]]; then
  echo "not set:$missing. On each node set NODE_RANK (0 on the first), MASTER_ADDR and MASTER_PORT of the first." >&2
  exit 2
fi
rendezvous=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")"""

_RENDEZVOUS_OF_ONE = """\
rendezvous=(--standalone)
if [[ -n "${MASTER_PORT:-}" ]]; then
  rendezvous=(--master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="$MASTER_PORT")
fi"""


def interactive_script(job: Job) -> list[str]:
    """Write the lines of a script that is run on every node, which starts torchrun there."""
    rendezvous = _RENDEZVOUS_OF_NODES if job.num_nodes > 1 else _RENDEZVOUS_OF_ONE
    return [
        *_opening(job),
        rendezvous,
        "",
        *_exec(job, _torchrun(job, nodes=job.num_nodes, at='"${rendezvous[@]}"')),
    ]


def local_script(job: Job) -> list[str]:
    """Write the lines of a script that trains on CPUs: the command starts its ranks itself, or torchrun does."""
    # A thread per core and process would make ranks on a CPU many times slower.
    job = replace(job, env={"OMP_NUM_THREADS": "1", **job.env})
    opening = _opening(job)
    if job.num_ranks > 1 and flag_value(job.command, "--distributed-world-size") is None:
        return [*opening, *_exec(job, _torchrun(job, nodes=1, at="--standalone"))]
    return [*opening, *_exec(job, [])]


def _opening(job: Job) -> list[str]:
    lines = ["#!/bin/bash", "set -eo pipefail", *job.cluster.setup, "set -u", ""]
    variables = exports(job.env)
    lines += [*variables, *container_exports(job), ""] if variables else []
    return [*lines, *command_array(job.command), "", *profile_without_gpus(job)]


def _torchrun(job: Job, *, nodes: int, at: str) -> list[str]:
    words = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={job.ranks_per_node}", at]
    # A rank that is told to stop saves first; torchrun kills it where that takes longer than this.
    words += [f"--shutdown-timeout={job.lead_sec}", "--no-python"]
    script = in_rank(job) if job.mode == "interactive" else None
    return words if script is None else [*words, "bash", "-c", quoted([script]), "rank"]


def _exec(job: Job, launcher: list[str]) -> list[str]:
    parts = [" ".join(part) for part in (container_words(job), launcher) if part]
    return ["exec " + " \\\n  ".join([*parts, '"${command[@]}"'])]
