"""Start real processes, for the few tests that need a new interpreter."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.ranks import REPOSITORY, CommandResult

__all__ = ["console_script", "run_process", "slurm_stubs", "start_process", "torchrun"]


def run_process(
    *command: Any, cwd: Path, python_path: Path = REPOSITORY, timeout: float = 100.0
) -> CommandResult:
    """Run ``command``; when it is not done after ``timeout`` seconds, it ends with all of its children."""
    process = start_process(*command, cwd=cwd, python_path=python_path)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return CommandResult(exit_codes=[process.returncode], outputs=[output])


def start_process(*command: Any, cwd: Path, python_path: Path = REPOSITORY) -> subprocess.Popen[str]:
    """Start ``command`` as the leader of a process group, with all that it prints in one pipe."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(python_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def console_script(name: str) -> Path:
    """Find an installed command beside the interpreter."""
    return Path(sys.executable).parent / name


def torchrun(num_processes: int) -> list[str]:
    """Make the start of a command line that runs the rest under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_processes)]


def slurm_stubs(folder: Path) -> Path:
    """Give a directory a ``scontrol`` that knows one node, this machine."""
    stub = folder / "scontrol"
    stub.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1]" ] && echo 127.0.0.1\n')
    stub.chmod(0o755)
    return folder
