"""Look at the experts: ``python -m fairseq_moe.inspect SAVE_DIR``, or ``fairseq-moe-inspect SAVE_DIR``.

Reads the record that training writes beside its checkpoints (``expert_load.record``), prints a table of layers x
experts and a warning for dead and overloaded experts, and draws a picture with ``--png``.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fairseq_moe.errors import MoEError
from fairseq_moe.expert_load.record import read_records
from fairseq_moe.expert_load.summary import history, layer_loads, select, warnings_of

__all__ = ["main"]

# By the training rule an expert has as many places as its mean load, so at twice the mean half of the tokens
# that ask for it are dropped.
_OVERLOADED_ABOVE = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``fairseq-moe-inspect``.

    Args:
        arguments: command line without the program's name; None: the process's own.

    Returns:
        Exit code: 0, or 1 after an error, which is one sentence on stderr. Wrong flags exit with 2.
    """
    args = _parser().parse_args(arguments)
    logging.getLogger("matplotlib").setLevel(
        logging.WARNING
    )  # importing fairseq turns all loggers up to DEBUG
    try:
        records = list(read_records(args.path))
        record = select(records, split=args.split, update=args.update, where=str(args.path))
        loads = layer_loads(record)
        table = _drawing("table", needs="rich")
        table.print_load(record, loads, warnings_of(loads, overloaded_above=args.overloaded))
        if args.png is not None:
            plot = _drawing("plot", needs="matplotlib")
            plot.draw_load(args.png, record, history(records, split=record.split))
            print(f"picture: {args.png}")
    except MoEError as error:
        print(f"fairseq_moe.inspect: {error}", file=sys.stderr)
        return 1
    return 0


def _drawing(name: str, *, needs: str) -> ModuleType:
    """Import ``table`` or ``plot``, whose library is an extra."""
    try:
        return importlib.import_module(f"fairseq_moe.expert_load.{name}")
    except ModuleNotFoundError as error:
        if error.name != needs:
            raise
        raise MoEError(f"this needs {needs}; install it with: pip install 'fairseq_moe[inspect]'") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-moe-inspect",
        description="Show how many tokens each expert of each layer was asked for.",
    )
    parser.add_argument("path", type=Path, help="a --save-dir, or the moe_load.jsonl in it")
    parser.add_argument("--png", type=Path, help="also draw a heat map and its history into this file")
    parser.add_argument(
        "--split",
        choices=("train", "valid"),
        help="whose record (default: valid if there is one, else train)",
    )
    parser.add_argument("--update", type=_update, help="number of an update, or 'last' (default)")
    parser.add_argument(
        "--overloaded",
        type=float,
        default=_OVERLOADED_ABOVE,
        metavar="RATIO",
        help="warn of experts with more than RATIO times the mean load (default: %(default)s); experts "
        "without any load are always named",
    )
    return parser


def _update(text: str) -> int | None:
    if text == "last":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'last'")
    return int(text)
