"""Parse and run the command line of ``fairseq-moe-launch``."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.launch.command import data_of
from fairseq_moe.launch.files import find_file, names
from fairseq_moe.launch.render import render
from fairseq_moe.launch.render.words import command_text
from fairseq_moe.launch.resolve import Resolution, resolve_all
from fairseq_moe.launch.settings import MAPS, SETTINGS
from fairseq_moe.launch.submit import submit
from fairseq_moe.launch.written import origins_table, resolved_yaml
from fairseq_moe.models.presets import PRESETS
from fairseq_moe.planner.built import built_lines
from fairseq_moe.planner.devices import Device, device_named
from fairseq_moe.planner.making import plan_job
from fairseq_moe.planner.reading import Job as PlannedJob
from fairseq_moe.planner.reading import read_job

__all__ = ["main"]

_PROGRAM = "fairseq-moe-launch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Start a job, or print what would be started.

    Args:
        arguments: command line without the program's name; None: the process's own.

    Returns:
        Exit code: 0, or 2 after problems, which are a sentence each on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    args, others = _parser().parse_known_args(words[:cut])
    if args.list:
        print(_listing(), end="")
        return 0
    logging.getLogger("hydra").setLevel(logging.WARNING)  # which fairseq uses to read flags
    try:
        resolution = resolve_all([*args.words, *others, *words[cut:]], os.environ)
        for note in resolution.notes:
            print(f"{_PROGRAM}: {note}", file=sys.stderr)
        if args.show_origin:
            print(origins_table(resolution.layered), end="")
            return 0
        dry_run = resolution.layered["dry_run"]
        if dry_run == "0":
            return submit(resolution.job, _texts(resolution, _read(resolution)))
        return _dry_run(resolution, builds=dry_run == "2")
    except ConfigError as error:
        for problem in error.problems:
            print(f"{_PROGRAM}: {problem}", file=sys.stderr)
    except MoEError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [--list] [--show-origin] RECIPE [key=value ...] [-- flags of fairseq-train]",
        allow_abbrev=False,
        description="Start a training job from a recipe. Later layers override earlier ones: recipe, cluster file, run "
        "file, environment (ModelZoo's variables), command line; flags after -- come last of all. DRY_RUN=1 prints "
        "settings, plan, script and command and starts nothing; DRY_RUN=2 also builds each stage without memory.",
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print recipes, clusters and keys")
    parser.add_argument(
        "--show-origin", action="store_true", help="print each setting with the layer that gave it"
    )
    return parser


def _listing() -> str:
    lines = []
    for kind in ("recipe", "cluster"):
        lines += [f"{kind}s:", *(f"  {name:24}{_opening(kind, name)}" for name in names(kind)), ""]
    lines.append("keys:")
    for key, setting in SETTINGS.items():
        default = setting.default
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        lines.append(f"  {key:24}{setting.text}" + (f" [{default}]" if default not in (None, "") else ""))
    lines += [f"  {key + '.NAME':24}{text}" for key, text in MAPS.items()]
    return "\n".join(lines) + "\n"


def _opening(kind: str, name: str) -> str:
    """Read the first line of a file's comment."""
    first = find_file(kind, name).read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("# ")


def _dry_run(resolution: Resolution, *, builds: bool) -> int:
    job, planned = resolution.job, _read(resolution)
    texts = _texts(resolution, planned)
    parts = {
        "settings": texts["resolved.yaml"],
        "origins": texts["origins.txt"],
        "plan": texts["plan.txt"],
        "job script": render(job),
        "command": command_text(job.command),
    }
    for title, text in parts.items():
        print(f"# {title}\n{text}")
    if builds:
        print("\n".join(["# built", *built_lines(planned)]))
    return 0


def _texts(resolution: Resolution, planned: PlannedJob) -> dict[str, str]:
    """Write what the run directory says of settings and plan, by file."""
    layered = resolution.layered
    found = plan_job(planned, device=_device_of(resolution))
    return {
        "resolved.yaml": resolved_yaml(layered),
        "origins.txt": origins_table(layered),
        "plan.txt": found.table(),
        "plan.json": json.dumps(found.as_json(), indent=1) + "\n",
    }


def _device_of(resolution: Resolution) -> Device:
    on_cpu = resolution.job.cluster.gpus_per_node == 0
    return device_named("cpu" if on_cpu else resolution.layered["device"])


def _read(resolution: Resolution) -> PlannedJob:
    """Read the command for the planner; data that lie elsewhere have as many words as vocab_size says."""
    job, layered = resolution.job, resolution.layered
    data = data_of(layered)
    is_elsewhere = data is not None and not (Path(data.split(":")[0]) / "dict.txt").is_file()
    words = layered["vocab_size"] if is_elsewhere else None
    if is_elsewhere and words is None and layered["arch"] not in PRESETS:
        raise ConfigError(
            [f"data_path is {data!r}, which has no dict.txt here to plan with; give vocab_size=N, its words."]
        )
    return read_job(job.command[1:], num_ranks=job.num_ranks, device=_device_of(resolution), num_words=words)
