"""Write settings down as texts: YAML that gives the same job again, and a table of origins."""

import shlex
from typing import Any

from fairseq_moe.launch.layers import Layered
from fairseq_moe.launch.settings import MAPS

__all__ = ["origins_table", "resolved_yaml"]

# They name files that have been read: what these say is there.
_READ = ("recipe", "cluster", "run")


def resolved_yaml(layered: Layered) -> str:
    """Write all settings that have a value, as a file of settings; a recipe of it gives the same ones."""
    from omegaconf import OmegaConf

    values: dict[str, Any] = {}
    for key, value in layered.values.items():
        if "." not in key and key not in _READ and value is not None:
            values[key] = list(value) if isinstance(value, tuple) else value
    for name in MAPS:
        entries = layered.map(name)
        if entries:
            values[name] = {key: list(one) if isinstance(one, tuple) else one for key, one in entries.items()}
    text: str = OmegaConf.to_yaml(values)
    if layered.raw_flags:
        text += f"# raw flags: {shlex.join(layered.raw_flags)}\n"
    return text


def origins_table(layered: Layered) -> str:
    """Write a line for each setting that a layer has given: the key, its value, the layer."""
    rows = [(key, _shown(layered.values[key]), origin) for key, origin in layered.origins.items()]
    given = [row for row in rows if row[2] != "built in"]
    given += [("--", shlex.join(layered.raw_flags), "command line")] if layered.raw_flags else []
    widths = [max((len(row[column]) for row in given), default=0) for column in range(2)]
    return "".join(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}\n" for key, value, origin in given)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
