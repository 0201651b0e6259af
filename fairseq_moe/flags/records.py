"""Declare flags as fields of plain records, read records from configurations, and check single values.

A record is a frozen dataclass. A field made by ``flag`` declares a flag of ours, once: ``fairseq_moe.models.flags``
gives the same fields to fairseq, which makes command-line arguments and hydra's nodes of them, and
``fairseq_moe.stock.tables`` prints them. A field without it reads a flag of stock's.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from typing import Any

__all__ = [
    "NOT_NEGATIVE",
    "POSITIVE",
    "Group",
    "Range",
    "changed_fields",
    "declared_fields",
    "flag",
    "flag_name",
    "getter",
    "given_fields",
    "one_of",
    "ranges",
    "words",
]


class Group(enum.Enum):
    """Name what a flag is about; docs/flags.md shows one table per group, in this order."""

    EXPERTS = "Experts"
    ROUTING = "Routing"
    LOGGING = "Gate loss and logging"
    BLOCKS = "Blocks"
    SPEED = "Memory and speed"
    PARALLEL = "Parallel axes and sharded states"
    FAILURES = "Failures"
    PROFILING = "Profiling"
    MEGATRON = "Accepted from Megatron"


def flag(group: Group, default: Any, text: str, **fairseq: Any) -> Any:
    """Declare a flag as a field of a record.

    Args:
        group: the table that shows it.
        default: its value when it is not given.
        text: its help.
        fairseq: what else fairseq or ``models.flags`` should know: ``argparse_const``, ``argparse_alias``, ``choices``.
    """
    return dataclasses.field(default=default, metadata={"help": text, "group": group, **fairseq})


def declared_fields(record: type[Any]) -> list["Field[Any]"]:
    """List the fields of a record that declare flags of ours."""
    return [field for field in fields(record) if "group" in field.metadata]


def flag_name(name: str) -> str:
    """Spell the flag of a field: ``--moe-freq`` for ``moe_freq``."""
    return "--" + name.replace("_", "-")


def getter(args: Any) -> Callable[[str], Any]:
    """Make a function that reads a field of a namespace, config or mapping by name; None where it has none."""
    return args.get if isinstance(args, Mapping) else lambda name: getattr(args, name, None)


def given_fields(record: type[Any], args: Any) -> dict[str, Any]:
    """Collect the fields of a dataclass that ``args`` (a namespace, config or mapping) has a value for."""
    get = getter(args)
    found = {field.name: get(field.name) for field in fields(record)}
    return {name: value for name, value in found.items() if value is not None}


def changed_fields(record: Any) -> list[str]:
    """Name the fields of a record that are not at their defaults."""
    default = type(record)()
    return [
        field.name for field in fields(record) if getattr(record, field.name) != getattr(default, field.name)
    ]


def words(text: str) -> list[str]:
    """Split a list that is written with spaces or commas, in brackets or not."""
    return str(text).strip("[]()").replace(",", " ").replace("'", " ").split()


# Whether a value can be honoured, and the words of the sentence that refuses it.
Range = tuple[Callable[[Any], bool], str]
POSITIVE: Range = (lambda value: 0 < value < math.inf, "a positive number")
NOT_NEGATIVE: Range = (lambda value: 0 <= value < math.inf, "at least 0")


def one_of(record: Any, choices: Mapping[str, Collection[str]]) -> list[str]:
    """Refuse values that are none of their flag's choices, one sentence each; None was not given.

    Args:
        record: the flags.
        choices: the values that there are, by field.
    """
    return [
        f"{flag_name(name)} is {getattr(record, name)!r}, expected one of {', '.join(allowed)}."
        for name, allowed in choices.items()
        if getattr(record, name) not in (None, *allowed)
    ]


def ranges(record: Any, allowed: Mapping[str, Range]) -> list[str]:
    """Refuse values out of their flag's range, one sentence each; None was not given.

    Args:
        record: the flags.
        allowed: the range by field.
    """
    return [
        f"{flag_name(name)} is {getattr(record, name)}, expected {expected}."
        for name, (is_good, expected) in allowed.items()
        if getattr(record, name) is not None and not is_good(getattr(record, name))
    ]
