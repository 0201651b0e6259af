"""Run ``fairseq-moe-plan``: options of the plan, and the flags of ``fairseq-train`` that it is about."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.expert_load.record import read_records
from fairseq_moe.expert_load.summary import layer_loads, select
from fairseq_moe.planner.built import built_lines
from fairseq_moe.planner.calibrate import compare, comparison_lines
from fairseq_moe.planner.devices import DEVICES, Device, device_named
from fairseq_moe.planner.load import exchanges, load_lines
from fairseq_moe.planner.making import plan_job
from fairseq_moe.planner.picture import draw
from fairseq_moe.planner.plan import Plan
from fairseq_moe.planner.reading import Job, read_job
from fairseq_moe.planner.search import flags_of, reasons_of, search
from fairseq_moe.planner.table import text_table

__all__ = ["main"]

_USER_ERROR = 2
_DOES_NOT_FIT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``fairseq-moe-plan``.

    Args:
        arguments: command line without the program's name; None: the process's own.

    Returns:
        Exit code: 0; 1 where the run does not fit; 2 after an error of the user's, one sentence each on stderr.
    """
    options, flags = _parser().parse_known_args(arguments)
    if flags[:1] == ["--"]:
        del flags[0]
    # Importing fairseq turns all loggers up to DEBUG.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        return _run(options, flags)
    except MoEError as error:
        for sentence in error.problems if isinstance(error, ConfigError) else [str(error)]:
            print(f"fairseq-moe-plan: error: {sentence}", file=sys.stderr)
        return _USER_ERROR


def _run(options: argparse.Namespace, flags: list[str]) -> int:
    device = device_named(options.device)
    if options.calibrate is not None:
        print("\n".join(comparison_lines(compare(options.calibrate))))
        return 0
    job = read_job(flags, num_ranks=options.ranks, device=device, num_words=options.vocabulary)
    if options.search:
        return _print_search(job, device, as_json=options.json)
    found = plan_job(job, device=device, like=options.like)
    more = _load_lines(options.load, job, device) if options.load is not None else []
    more += ["", *built_lines(job)] if options.build else []
    print(json.dumps(found.as_json(), indent=2) if options.json else "\n".join([found.table(), *more]))
    if options.picture is not None:
        _draw(options.picture, job, found)
    return 0 if found.fits else _DOES_NOT_FIT


def _draw(path: Path, job: Job, found: Plan) -> None:
    mapping = job.mapping
    if not path.suffix:  # matplotlib would choose one, and write another file
        raise MoEError(f"--picture is {str(path)!r}, expected a file that ends in .png, .svg or .pdf.")
    try:
        draw(
            path, found, pipe=mapping.grid.pipe, virtual=mapping.virtual, micro_batches=mapping.micro_batches
        )
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise MoEError(
            "--picture needs matplotlib; install it with: pip install 'fairseq_moe[inspect]'"
        ) from None
    except (OSError, ValueError) as error:
        raise MoEError(
            f"cannot write the picture {path} ({error}); name a .png, .svg or .pdf file."
        ) from error
    print(f"picture: {path}", file=sys.stderr)


def _load_lines(path: Path, job: Job, device: Device) -> list[str]:
    record = select(list(read_records(path)), split=None, update=None, where=str(path))
    simulated = exchanges(
        layer_loads(record),
        job.shape,
        job.mapping,
        value_bytes=job.precision.gathered,
        ranks_per_node=device.ranks_per_node,
    )
    return ["", *load_lines(simulated)]


def _print_search(job: Job, device: Device, *, as_json: bool) -> int:
    found = search(job, device)
    best: list[dict[str, Any]] = [
        {
            "mapping": each.mapping.name,
            "flags": flags_of(each.mapping),
            "peak_bytes": each.peak_bytes,
            "step_sec": [each.time.fast_sec, each.time.slow_sec],
            "reasons": reasons_of(each, device, job.shape),
        }
        for each in found.best
        if each.time is not None
    ]
    if as_json:
        numbers = {"num_mappings": found.num_mappings, "num_fitting": found.num_fitting}
        print(json.dumps({"schema": 1, **numbers, "best": best}, indent=2))
        return 0 if best else _DOES_NOT_FIT
    print(
        f"{found.num_mappings} mappings of {job.mapping.grid.world_size} x {device.name}, {found.num_fitting} fit."
    )
    if best:
        rows = [
            (each["mapping"], f"{each['step_sec'][0]:.3g} to {each['step_sec'][1]:.3g}", each["reasons"])
            for each in best
        ]
        print("\n".join(text_table(("mapping", "s per update", "why"), rows)))
        print(f"The first one's flags: {' '.join(best[0]['flags'])}")
    return 0 if best else _DOES_NOT_FIT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-moe-plan",
        description="Plan a run of fairseq-train: memory, traffic and time on so many ranks. All other flags are those "
        "of fairseq-train; no data directory is needed.",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default: %(default)s)")
    parser.add_argument(
        "--device", default="h100", help=f"of each: {', '.join(DEVICES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--like", choices=("ours", "megatron"), default="ours", help="whose numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        metavar="V",
        help="words of the dictionary (default: those of the data directory)",
    )
    parser.add_argument("--json", action="store_true", help="print numbers for machines")
    parser.add_argument(
        "--search", action="store_true", help="list the best mappings of as many ranks instead"
    )
    parser.add_argument(
        "--build",
        action="store_true",
        help="also build each stage without memory, and compare its parameters",
    )
    parser.add_argument("--picture", type=Path, help="also draw memory and schedule into this file")
    parser.add_argument(
        "--load",
        type=Path,
        metavar="RECORD",
        help="also simulate the exchange under a recorded load (moe_load.jsonl)",
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="RUN_DIR", help="compare a finished run with its plan instead"
    )
    return parser
