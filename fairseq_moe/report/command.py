"""Write a run's page from the command line: ``fairseq-moe-report RUN_DIR``, or ``python -m fairseq_moe.report``."""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_moe.errors import MoEError
from fairseq_moe.report.writing import watch, write_report

__all__ = ["main"]

_EVERY_SEC = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``fairseq-moe-report``.

    Args:
        arguments: command line without the program's name; None: the process's own.

    Returns:
        Exit code: 0, or 2 after an error, which is one sentence on stderr.
    """
    args = _parser().parse_args(arguments)
    logging.getLogger("matplotlib").setLevel(
        logging.WARNING
    )  # importing fairseq turns all loggers up to DEBUG
    try:
        if args.watch is None:
            print(write_report(args.run_dir, logs=args.log, output=args.output))
        else:
            reason = watch(args.run_dir, logs=args.log, output=args.output, every_sec=args.watch, told=_tell)
            print(reason)
    except MoEError as error:
        print(f"fairseq-moe-report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the page stays as it is.")
    return 0


def _tell(path: Path) -> None:
    print(path, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-moe-report", description="Write one HTML page about a training run."
    )
    parser.add_argument(
        "run_dir", type=Path, help="a run directory of fairseq-moe-launch, or a --save-dir of fairseq"
    )
    parser.add_argument(
        "--log",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a log of the run: what --log-file was given, or a rank's output; may be given several times (default: "
        "the logs in the directory and in its logs/)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: RUN_DIR/report.html)")
    parser.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=_EVERY_SEC,
        metavar="SECONDS",
        help="write the page anew while the job runs, looking every so many seconds (default: %(const)g)",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
