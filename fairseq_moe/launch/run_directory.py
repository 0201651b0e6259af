"""Keep in a run's directory what it was: settings, command, script, versions and plan, each file whole or not there."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq_moe.checkpoint.files import TEMPORARY, flush_directory, make_directory
from fairseq_moe.errors import ConfigError
from fairseq_moe.launch.job import Job
from fairseq_moe.launch.render import command_text, flag_value, render
from fairseq_moe.launch.versions import versions

__all__ = ["SCRIPT", "VERSIONS", "write_run_directory", "write_text"]

SCRIPT = "job.sh"
VERSIONS = "versions.json"
_FOLDERS = ("logs", "profile")  # nsys and SLURM make none


def write_run_directory(job: Job, texts: Mapping[str, str]) -> Path:
    """Write what a run is into its directory, before it starts or goes on.

    Args:
        job: names the directory; its script and command are written.
        texts: further files by name, such as ``resolved.yaml``, ``origins.txt``, ``plan.json`` and ``plan.txt``.

    Returns:
        the path of the script, which holds the bytes of ``render(job)``.

    Raises:
        ConfigError: the job cannot be written down, or the directory is another run's.
    """
    script = render(job)
    run = {"name": job.name, "arch": flag_value(job.command, "--arch")}
    _check_whose(job.run_dir, run)
    write_text(job.run_dir / VERSIONS, json.dumps({"run": run, **versions()}, indent=1) + "\n")
    for folder in _FOLDERS:
        if (job.run_dir / folder).exists() and not (job.run_dir / folder).is_dir():
            raise ConfigError([f"{job.run_dir / folder} is a file, where logs or profiles go; move it away."])
        (job.run_dir / folder).mkdir(exist_ok=True)
    for name, text in {**texts, "command.sh": command_text(job.command), SCRIPT: script}.items():
        write_text(job.run_dir / name, text)
    return job.run_dir / SCRIPT


def write_text(path: Path, text: str) -> None:
    """Write a small file so that its readers find the old text or the new one, whatever happens.

    Raises:
        ConfigError: it cannot be written.
    """
    # Nodes of one run write it together, and in containers their processes may have the same number.
    temporary = path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(8)}")
    try:
        directories = make_directory(path.parent)
        try:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for directory in directories:
            flush_directory(directory)
    except OSError as error:
        raise ConfigError(
            [f"cannot write {path} ({error}); give another run directory, or make room."]
        ) from error


def _check_whose(run_dir: Path, run: dict[str, str | None]) -> None:
    if not run_dir.exists():
        return
    advice = "give this run another name or directory"
    if not run_dir.is_dir():
        raise ConfigError([f"the run directory {run_dir} is a file; {advice}."])
    found = _recorded(run_dir / VERSIONS)
    # Another node of this run may be writing the first file, or a kill has left it.
    begun = f"{VERSIONS}{TEMPORARY}"
    if found is None and not all(entry.name.startswith(begun) for entry in run_dir.iterdir()):
        raise ConfigError([f"{run_dir} holds files, and {VERSIONS} does not say of which run; {advice}."])
    if found is not None and found != run:
        raise ConfigError([f"{run_dir} is the directory of {_said(found)}, not of {_said(run)}; {advice}."])


def _recorded(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    run = content.get("run") if isinstance(content, dict) else None
    return run if isinstance(run, dict) else None


def _said(run: Mapping[str, Any]) -> str:
    return f"run {run.get('name')!r} (--arch {run.get('arch')})"
