"""Parse flags as ``fairseq-train`` does; whatever its parser makes of wrong ones is sentences."""

import argparse
import contextlib
import difflib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_moe.errors import ConfigError

__all__ = ["configured", "parsed"]

_CHOICE = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)")
_MOST_CHOICES = 12  # that a sentence lists


def parsed(
    argv: Sequence[str], *, modify_parser: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """Parse flags of ``fairseq-train``.

    Args:
        argv: without the program's name.
        modify_parser: called with the parser, before its tasks and models have added theirs.

    Raises:
        ConfigError: they cannot be parsed.
    """
    if not any(re.fullmatch(r"--arch(=.*)?|-a.*", word) for word in argv):
        raise ConfigError(["no model is named; give --arch, as in --arch mixtral_8x7b."])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            args: argparse.Namespace = options.parse_args_and_arch(
                options.get_training_parser(), list(argv), modify_parser=modify_parser
            )
    except SystemExit:
        lines = [line.split("error: ", 1)[1] for line in said.getvalue().splitlines() if "error: " in line]
        raise ConfigError([_sentence(line, argv) for line in lines or [_none_said(argv)]]) from None
    except Exception as error:  # stock evaluates some values, and imports --user-dir
        raise ConfigError([_refusal(error)]) from error
    return args


def configured(args: argparse.Namespace) -> Any:
    """Make a whole fairseq configuration, quietly.

    Raises:
        ConfigError: hydra cannot read a value.
    """
    try:
        with _quiet():
            return convert_namespace_to_omegaconf(args)
    except Exception as error:  # of hydra, omegaconf or antlr
        raise ConfigError([_refusal(error)]) from error


def _refusal(error: Exception) -> str:
    """Say what stock raised over a value, on one line."""
    reason = " ".join(str(error).split()).rstrip(".")
    return f"the flags cannot be read ({type(error).__name__}: {reason}); correct the value."


def _none_said(argv: Sequence[str]) -> str:
    if {"-h", "--help"} & {*argv}:
        return "--help asks fairseq-train for its flags; leave it out, or run fairseq-train --help"
    return "these flags are none of fairseq-train's"


def _sentence(said: str, argv: Sequence[str]) -> str:
    """Make a sentence of what the parser says: a long list of choices gives way to the nearest ones."""
    text = said.replace("invalid <lambda> value", "invalid value").rstrip(".")
    found = _CHOICE.fullmatch(text)
    choices = re.findall(r"'([^']*)'", found[3]) if found else []
    if found and len(choices) > _MOST_CHOICES:
        nearest = difflib.get_close_matches(found[2], choices, n=3, cutoff=0.0)
        return f"{found[1]} is {found[2]!r}, which there is not; the nearest are {', '.join(nearest)}."
    if text.startswith("unrecognized arguments") and not any(word.startswith("--task") for word in argv):
        text += (
            "; --task is not given, and stock's is translation: give --task language_modeling, or dummy_lm"
        )
    return f"{text}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what hydra says of itself away from what people and machines read."""
    loggers = [logging.getLogger(name) for name in ("hydra", "fairseq.dataclass.utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
