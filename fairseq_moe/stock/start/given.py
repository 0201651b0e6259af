"""Find out which flags the user gave: stock mixes them with defaults as soon as a command line is parsed."""

import argparse
from collections.abc import Sequence
from contextvars import ContextVar

from hydra.core.hydra_config import HydraConfig

__all__ = ["flag_is_given", "given_names", "note_given", "restore_given"]

_GIVEN: ContextVar[frozenset[str] | None] = ContextVar("given_flags", default=None)


def note_given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Remember which flags stand on a command line, whatever their values.

    Args:
        parser: knows all flags of the command.
        argv: arguments without the program's name; None: those of this process.
    """
    unset = object()
    # argparse puts a default only where the namespace has nothing yet.
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    found, _ = parser.parse_known_args(argv, blank)
    _GIVEN.set(frozenset(name for name, value in vars(found).items() if value is not unset))


def given_names() -> frozenset[str] | None:
    """Name the flags that the user gave, by command line or to hydra; None: nobody knows."""
    given = _GIVEN.get()
    if given is not None or not HydraConfig.initialized():
        return given
    overrides = HydraConfig.get().overrides.task
    return frozenset(override.split("=")[0].lstrip("+~").split(".")[-1] for override in overrides)


def restore_given(names: frozenset[str] | None) -> None:
    """Tell a spawned rank what its parent knows (``given_names``)."""
    _GIVEN.set(names)


def flag_is_given(name: str, *, differs: bool) -> bool:
    """Tell whether the user gave a flag.

    Args:
        name: the field's name.
        differs: whether its value is not the default. This decides where no command line was parsed, and for
            hydra's configuration files.
    """
    names = given_names()
    return differs if names is None else name in names or differs
