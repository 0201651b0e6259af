"""Stand in for SLURM on this machine: its commands as small programs, and what it does with a job that was submitted.

They do what the real ones do where a script depends on it: srun answers TERM by killing its tasks, and scancel signals
the tasks of a job's steps alone, not its batch shell nor any child of a task.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Scheduler", "Start", "write_program"]

JOB_ID = "17"

_SBATCH = """\
number=$(ls "$STATE" | grep -c '^submitted-')
cat > "$STATE/submitted-$number"
printf '%s\\n' "$*" >> "$STATE/sbatch"
[ "$number" -lt "${SBATCH_TAKES:-9}" ] || { echo 'sbatch: error: no more' >&2; exit 3; }
echo "$((17 + number));here"
"""
_SRUN = """\
printf '%s\\n' "$*" >> "$STATE/srun"
tasks=$SLURM_NTASKS
while [[ "$1" == -* ]]; do
  [[ "$1" == --ntasks=* ]] && tasks=${1#--ntasks=}
  shift
done
pids=()
told=
trap 'told=1; echo "srun: forcing job termination"; kill -KILL "${pids[@]}"' TERM
for ((rank = 0; rank < tasks; rank++)); do
  env SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_NTASKS=$tasks SLURM_STEP_NUM_TASKS=$tasks \\
    SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST='node[1]' "$@" &
  pids+=($!)
done
echo "${pids[*]}" > "$STATE/tasks.new" && mv "$STATE/tasks.new" "$STATE/tasks"
code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  found=$?
  [[ -z "$told" ]] || { wait "$pid"; found=$?; }  # the signal ended the first wait
  ((found > code)) && code=$found
done
exit "$code"
"""
_SCANCEL = """\
[ "$*" = "--signal=TERM 17" ] || exit 1
kill -TERM $(cat "$STATE/tasks")
"""
_SCONTROL = """\
case "$*" in
  "show hostnames node[1]") echo 127.0.0.1 ;;
  "requeue 17") touch "$STATE/requeue" ;;
  *) exit 1 ;;
esac
"""
_SQUEUE = 'echo "${JOB_STATE:-RUNNING}"\n'


def write_program(path: Path, text: str) -> Path:
    """Write a bash program."""
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)
    return path


@dataclass(frozen=True)
class Start:
    """Hold what one start of a job has come to.

    Args:
        exit_code: of the batch shell.
        output: of all.
        requeued: whether the job has asked to be queued again.
    """

    exit_code: int
    output: str
    requeued: bool


@dataclass
class Scheduler:
    """Keep stubs of SLURM's commands in a directory of its own.

    Args:
        folder: an empty one.
        environ: variables of submission and of jobs, on top of the test's.
    """

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.folder / "state"
        self.state.mkdir(parents=True)
        texts = {
            "sbatch": _SBATCH,
            "srun": _SRUN,
            "scancel": _SCANCEL,
            "scontrol": _SCONTROL,
            "squeue": _SQUEUE,
        }
        for name, text in texts.items():
            write_program(self.folder / name, text)
        self.environ = {
            "STATE": str(self.state),
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            **self.environ,
        }

    @property
    def submitted(self) -> list[bytes]:
        """Read what sbatch was given, job by job."""
        return [path.read_bytes() for path in sorted(self.state.glob("submitted-*"))]

    def said(self, command: str) -> list[str]:
        """Read the arguments that a command was called with, call by call."""
        path = self.state / command
        return path.read_text().splitlines() if path.exists() else []

    def start(
        self,
        script: bytes,
        *,
        ranks: int,
        restarts: int = 0,
        term_when: Callable[[str], bool] | None = None,
        environ: Mapping[str, str] | None = None,
        timeout_sec: float = 140.0,
    ) -> Start:
        """Run a job as SLURM does: a copy of its script, in the variables of an allocation.

        Args:
            script: what was submitted.
            ranks: tasks of the job, on one node.
            restarts: how often it was started before.
            term_when: told the output so far; once it says True, the batch shell alone gets TERM.
            environ: further variables of this start.
            timeout_sec: after it everything is killed.
        """
        spooled = self.folder / "slurm_script"
        spooled.write_bytes(script)
        for name in ("requeue", "tasks"):
            (self.state / name).unlink(missing_ok=True)
        variables = {
            "SLURM_JOB_ID": JOB_ID, "SLURM_NTASKS": str(ranks), "SLURM_JOB_NODELIST": "node[1]",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }  # fmt: skip
        log = self.folder / f"output-{restarts}"
        with log.open("w") as output:
            shell = subprocess.Popen(
                ["bash", spooled],
                env={**os.environ, **self.environ, **variables, **(environ or {})},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self._watch(shell, log, term_when, timeout_sec)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        return Start(shell.returncode, log.read_text(), (self.state / "requeue").exists())

    def _watch(
        self,
        shell: "subprocess.Popen[bytes]",
        log: Path,
        term_when: Callable[[str], bool] | None,
        timeout_sec: float,
    ) -> None:
        deadline = time.monotonic() + timeout_sec
        while shell.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            is_stepping = (
                self.state / "tasks"
            ).exists()  # SLURM sends no signal to a step that is not there yet
            if term_when is not None and is_stepping and term_when(log.read_text()):
                shell.terminate()
                term_when = None
            time.sleep(0.05)
        assert term_when is None, f"the job ended before TERM: {log.read_text()[-3000:]}"
