"""Find recipes and cluster files, by name or by path, and read them as flat maps of keys."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq_moe.launch.settings import MAPS

__all__ = ["find_file", "flat", "names", "read_yaml"]

_FOLDERS = {"recipe": "recipes", "cluster": "clusters"}


def names(kind: str) -> list[str]:
    """List the names of the files of a kind that come with this package.

    Args:
        kind: ``recipe`` or ``cluster``.
    """
    return sorted(path.stem for path in (Path(__file__).parent / _FOLDERS[kind]).glob("*.yaml"))


def find_file(kind: str, name: str) -> Path:
    """Find a YAML file.

    Args:
        kind: ``recipe``, ``cluster`` or ``run``.
        name: a path, if it ends in .yaml or .yml; else the name of one of this package's, in any case, with dashes,
            points or underscores: ``GLM-4.5`` is ``glm_4_5``.

    Raises:
        ValueError: one sentence.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            if Path(name).is_file():
                return Path(name)
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            raise ValueError(f"{kind} is {name!r}, which cannot be read ({error.strerror}).") from error
        raise ValueError(f"{kind} is {name!r}, and there is no such file.")
    if kind not in _FOLDERS:
        raise ValueError(f"{kind} is {name!r}, expected the path of a .yaml file.")
    known = names(kind)
    wanted = name.lower().replace("-", "_").replace(".", "_")
    if wanted in known:
        return Path(__file__).parent / _FOLDERS[kind] / f"{wanted}.yaml"
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    raise ValueError(f"there is no {kind} {name!r}; {hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of settings, in which nothing is evaluated, as ``flat`` keys.

    Raises:
        ValueError: one sentence.
    """
    import yaml  # type: ignore[import-untyped]
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ValueError(f"{path} does not hold a map of keys to values.")
        values = OmegaConf.to_container(loaded, resolve=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from error
    except RecursionError as error:
        raise ValueError(
            f"{path} cannot be read as YAML: it is nested too deeply, or holds itself."
        ) from error
    try:
        return flat(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def flat(values: Any) -> dict[str, Any]:
    """Write the keys of maps within a map with a dot; flags with dashes, as they are typed.

    Raises:
        ValueError: two spellings of one key.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if value is None and key in MAPS:
            continue  # a map without entries
        entries = (
            {f"{key}.{inner}": one for inner, one in value.items()}
            if isinstance(value, Mapping)
            else {str(key): value}
        )
        for written, one in entries.items():
            if spelled(written) in found:
                raise ValueError(f"{spelled(written)} is given twice; leave one out.")
            found[spelled(written)] = one
    return found


def spelled(key: str) -> str:
    """Spell the name of a flag with dashes and without the first two; other keys stay as they are."""
    first, dot, rest = key.partition(".")
    return f"flags.{rest.lstrip('-').replace('_', '-')}" if first == "flags" and dot else key
