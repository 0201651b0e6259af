"""Write a SLURM job: one task a rank, a save ahead of the time limit, and back into the queue after a good one."""

from pathlib import Path

from fairseq_moe.launch.job import Job
from fairseq_moe.launch.render.containers import container_exports, container_words, outside_path, srun_flags
from fairseq_moe.launch.render.in_rank import in_rank, profile_without_gpus
from fairseq_moe.launch.render.words import command_array, exports, flag_value, quoted

__all__ = ["sbatch_script"]

# What bash does with TERM, and how it waits. ``wait`` ends when a signal has been handled, so it is asked again.
_WAITING = """\
saved() {{ stat --format='%i %y' {checkpoint} 2> /dev/null || echo none; }}

stopped= interrupted= saved_before=
on_term() {{
  interrupted=1
  [[ -z "$stopped" ]] || return 0
  stopped=1
  saved_before=$(saved)
  # To the ranks, not to srun: srun answers TERM by killing them.
  scancel --signal=TERM "$SLURM_JOB_ID" || echo "job.sh: scancel could not tell the ranks to save" >&2
}}
trap on_term TERM

{srun} &
ranks=$!
while :; do
  interrupted= status=0
  wait "$ranks" || status=$?
  [[ -n "$interrupted" ]] || break
done

if [[ -n "$stopped" && "$status" == 0 && "$(saved)" == "$saved_before" ]]; then
  echo "job.sh: TERM came, and no checkpoint was written after it; the job has failed" >&2
  status=1
fi"""

_REQUEUE = """\
if [[ -n "$stopped" && "$status" == 0 ]]; then
  restarts=${{SLURM_RESTART_COUNT:-0}}
  if ((restarts >= {most})); then
    echo "job.sh: saved, and not queued again: started again $restarts times already, and {most} is the most" >&2
  elif [[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" == RUNNING ]]; then
    echo "job.sh: saved, and queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  fi
fi"""

_MEASURED = """\
if [[ "$status" == 0 ]]; then
  {srun} || echo "job.sh: measured.json was not written" >&2
fi
exit "$status\""""


def sbatch_script(job: Job) -> list[str]:
    """Write the lines of a script for sbatch."""
    save_dir = flag_value(job.command, "--save-dir") or str(job.run_dir / "checkpoints")
    checkpoint = str(Path(outside_path(job, save_dir)) / "checkpoint_last.pt")
    lines = ["#!/bin/bash", *_directives(job), "", "set -eo pipefail", *job.cluster.setup, "set -u", ""]
    variables = exports(job.env)
    lines += [*variables, *container_exports(job), ""] if variables else []
    lines += [*_rendezvous(job), *command_array(job.command), "", *profile_without_gpus(job)]
    lines += [_WAITING.format(checkpoint=quoted([checkpoint]), srun=_training(job)), ""]
    if job.requeue:
        lines += [_REQUEUE.format(most=job.max_restarts), ""]
    return [*lines, _MEASURED.format(srun=_measuring(job))]


def _directives(job: Job) -> list[str]:
    cluster = job.cluster
    log = str(job.run_dir / "logs").replace("%", "%%") + "/%j.log"
    values: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("nodes", job.num_nodes),
        ("ntasks-per-node", job.ranks_per_node),
        ("gpus-per-node", job.ranks_per_node if cluster.gpus_per_node else None),
        ("cpus-per-task", cluster.cpus_per_task),
        ("account", cluster.account),
        ("partition", cluster.partition),
        ("time", job.time_limit),
        ("segment", cluster.segment),
        ("output", log),
        ("signal", f"B:TERM@{job.lead_sec}"),
    ]
    options = [f"--{name}={value}" for name, value in values if value is not None]
    options += ["--exclusive", "--open-mode=append", "--requeue" if job.requeue else "--no-requeue"]
    return [f"#SBATCH {quoted([option])}" for option in (*options, *cluster.sbatch_args)]


def _rendezvous(job: Job) -> list[str]:
    """Write where ranks in containers meet; others ask scontrol themselves."""
    if job.container.kind == "none":
        return []
    port = flag_value(job.command, "--distributed-port")
    number = "$((10000 + SLURM_JOB_ID % 50000))" if port is None else quoted([port])
    host = 'scontrol show hostnames "$SLURM_JOB_NODELIST"'
    return [
        f"MASTER_ADDR=$({host} | head -n 1)",
        f"MASTER_PORT={number}",
        "export MASTER_ADDR MASTER_PORT",
        "",
    ]


def _training(job: Job) -> str:
    words = ["srun"]
    if job.cluster.cpus_per_task is not None:
        words.append(
            f"--cpus-per-task={job.cluster.cpus_per_task}"
        )  # srun does not take it from sbatch everywhere
    words.append(quoted(job.cluster.srun_args))
    script = in_rank(job)
    inner = [] if script is None else ["bash", "-c", quoted([script]), "rank"]
    return _joined(words, srun_flags(job), container_words(job), inner, ['"${command[@]}"'])


def _measuring(job: Job) -> str:
    words = ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    module = ["python", "-m", "fairseq_moe.launch.measured", quoted([str(job.run_dir)])]
    return _joined(words, srun_flags(job), container_words(job), module)


def _joined(*parts: list[str]) -> str:
    lines = (" ".join(word for word in part if word) for part in parts)
    return " \\\n    ".join(line for line in lines if line)
