"""--use-moe-pad-mask on the command line: alone, or followed by true or false."""

import argparse
from typing import Any

__all__ = ["add_padding_argument"]


def add_padding_argument(parser: Any, *, help_text: str) -> None:
    """Add the flag before fairseq makes a switch of it, which could not be turned off.

    Args:
        parser: an ``argparse`` parser or group.
        help_text: of the flag.
    """
    parser.add_argument(
        "--use-moe-pad-mask",
        nargs="?",
        const=True,
        type=_true_or_false,
        metavar="true|false",
        help=help_text,
    )


def _true_or_false(text: str) -> bool:
    found = {"true": True, "false": False}.get(text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither true nor false (if it is the data directory: put that before the flags)"
        )
    return found
