"""Run a job, or hand it to SLURM: the bytes that ``render`` gives, and no others."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.launch.job import Job
from fairseq_moe.launch.measured import write_measured
from fairseq_moe.launch.render import render
from fairseq_moe.launch.run_directory import write_run_directory

__all__ = ["submit"]

_PIECE_BYTES = 1 << 16


def submit(job: Job, texts: Mapping[str, str] | None = None) -> int:
    """Write the run's directory; then hand its script to sbatch, or run it here and show what it says.

    Args:
        job: what to run.
        texts: of ``write_run_directory``.

    Returns:
        Exit code: of sbatch, or of the run.

    Raises:
        ConfigError: the job cannot be written down, its directory is another run's, a file would hold a secret, or
            sbatch is not installed.
    """
    texts = dict(texts or {})
    _check_secrets(job, texts)
    if job.mode == "sbatch" and shutil.which("sbatch") is None:
        raise ConfigError(
            ["sbatch is not found; submit from a machine of the cluster, or use mode interactive."]
        )
    script = write_run_directory(job, texts)
    return _submit_chain(job, script) if job.mode == "sbatch" else _run(job, script)


def _check_secrets(job: Job, texts: Mapping[str, str]) -> None:
    """Refuse a value of a secret in whatever would be written; the sentence does not repeat it."""
    # Words, and the script too: it alone has all of cluster and container.
    words = [job.name, str(job.run_dir), *job.command, *job.env.values()]
    places = {"the job": "\n".join([*words, render(job)]), **texts}
    problems = [
        f"{place} holds the value of {name}, which is a secret; leave it to the environment."
        for name in job.secrets
        for place, text in places.items()
        if os.environ.get(name) and os.environ[name] in text
    ]
    if problems:
        raise ConfigError(problems)


def _submit_chain(job: Job, script: Path) -> int:
    content, previous = script.read_bytes(), None
    for number in range(1, job.chain + 1):
        after: list[str] = [] if previous is None else [f"--dependency=afterany:{previous}"]
        run = subprocess.run(
            ["sbatch", "--parsable", *after], input=content, stdout=subprocess.PIPE, check=False
        )
        if run.returncode != 0:
            print(
                f"sbatch has ended with {run.returncode}; {number - 1} of {job.chain} jobs are submitted.",
                file=sys.stderr,
            )
            return run.returncode
        previous = run.stdout.decode().strip().partition(";")[0]  # ID, or ID;CLUSTER
        print(
            f"submitted job {previous} ({number} of {job.chain}): {job.run_dir}/logs/{previous}.log",
            flush=True,
        )
    return 0


def _run(job: Job, script: Path) -> int:
    node = os.environ.get("NODE_RANK", "0") if job.num_nodes > 1 else "0"
    log = job.run_dir / "logs" / (f"{job.mode}.log" if node == "0" else f"{job.mode}-node-{node}.log")
    # The commands of this installation come first, whether or not its environment has been activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with log.open("ab") as file:
        process = subprocess.Popen(
            ["bash", str(script)],
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        with _signals_passed_on(process):
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), _PIECE_BYTES):
                file.write(piece)
                file.flush()
                sys.stdout.buffer.write(piece)
                sys.stdout.flush()
            code = process.wait()
    if code == 0 and node == "0":
        try:
            write_measured(job.run_dir)
        except MoEError as error:
            print(f"measured.json was not written: {error}", file=sys.stderr)
    return code if code >= 0 else 128 - code


@contextmanager
def _signals_passed_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Wait for a run that is told to stop, and tell it; a terminal's interrupt has reached it already."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, pass_on) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
