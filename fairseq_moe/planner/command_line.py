"""Run ``fairseq-moe-plan``: options of the plan, and the flags of ``fairseq-train`` that it is about."""

import argparse
import json
import sys
from collections.abc import Sequence

from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.planner.devices import DEVICES, device_named
from fairseq_moe.planner.making import plan

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
    try:
        return _run(options, flags)
    except MoEError as error:
        for sentence in error.problems if isinstance(error, ConfigError) else [str(error)]:
            print(f"fairseq-moe-plan: error: {sentence}", file=sys.stderr)
        return _USER_ERROR


def _run(options: argparse.Namespace, flags: list[str]) -> int:
    device = device_named(options.device)
    found = plan(
        flags, num_ranks=options.ranks, device=device, like=options.like, num_words=options.vocabulary
    )
    print(json.dumps(found.as_json(), indent=2) if options.json else found.table())
    return 0 if found.fits else _DOES_NOT_FIT


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
    return parser
