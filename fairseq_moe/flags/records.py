"""Read flags into records: from namespaces, fairseq's configurations and mappings alike."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

__all__ = ["getter", "given_fields", "words"]


def getter(args: Any) -> Callable[[str], Any]:
    """Reads a field of a namespace, config or mapping by its name; None where it has none."""
    return args.get if isinstance(args, Mapping) else lambda name: getattr(args, name, None)


def given_fields(record: type[Any], args: Any) -> dict[str, Any]:
    """The fields of a dataclass that ``args`` (a namespace, config or mapping) has a value for."""
    get = getter(args)
    found = {field.name: get(field.name) for field in fields(record)}
    return {name: value for name, value in found.items() if value is not None}


def words(text: str) -> list[str]:
    """Parts of a list that is written with spaces or commas, in brackets or not."""
    return str(text).strip("[]()").replace(",", " ").replace("'", " ").split()
