"""Read and write which layers attend through a sliding window, and how wide it is."""

from collections.abc import Sequence
from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["layer_types", "window_of", "windows"]

_FULL, _SLIDING = "full_attention", "sliding_attention"


def window_of(keys: ConfigKeys, *, absent: int | None = None, is_on: bool = True) -> int | None:
    """Read ``sliding_window``: tokens that a query sees, itself included.

    Args:
        keys: of config.json.
        absent: what an absent key means; null always means none.
        is_on: another key says that windows are used at all.

    Returns:
        None: there is none.
    """
    if not is_on:
        keys.ignore("sliding_window")
        return None
    default = None if "sliding_window" in keys.values else absent
    window: int | None = keys.integer("sliding_window", default=default)
    return window


def windows(
    keys: ConfigKeys, window: int | None, *, num_layers: int, default: Sequence[bool]
) -> dict[str, Any]:
    """Read ``layer_types``: which layers have the window.

    Args:
        keys: of config.json.
        window: its width; None: no layer may have one.
        num_layers: of the model.
        default: for each layer, what an absent or null list means.
    """
    keys.ignore("layer_types")
    types = keys.values.get("layer_types")
    if types is None:
        layers = tuple(default)
    elif (
        isinstance(types, list)
        and len(types) == num_layers
        and all(kind in (_FULL, _SLIDING) for kind in types)
    ):
        layers = tuple(kind == _SLIDING for kind in types)
    else:
        keys.problems.append(
            f"{keys.source} has layer_types {types!r}, expected {num_layers} entries {_FULL} or {_SLIDING}."
        )
        return {}
    if not any(layers):
        return {}
    if window is None:
        keys.problems.append(
            f"{keys.source} has layers with {_SLIDING}, but no sliding_window that says how wide."
        )
    return {"window": window, "window_layers": layers}


def layer_types(spec: ModelSpec) -> list[str]:
    """List the kind of each layer's attention, as ``layer_types`` has it."""
    layers = spec.window_layers or (False,) * spec.num_layers
    return [_SLIDING if has_window else _FULL for has_window in layers]
