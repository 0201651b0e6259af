"""Reduce the parameter groups of an optimizer to what checkpoints keep of them."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["hyperparameters"]


def hyperparameters(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy each group without ``params``, torch's numbers of its parameters.

    Numbers depend on the backend and on the ranks; checkpoints store optimizer state by name instead.

    Args:
        groups: ``param_groups`` of an optimizer's state dictionary.
    """
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]
