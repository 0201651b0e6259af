"""Say which of several layers gives each setting its value: the last one that has the key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq_moe.errors import ConfigError
from fairseq_moe.launch.files import find_file, read_yaml, spelled
from fairseq_moe.launch.settings import SETTINGS, key_problem, read_value
from fairseq_moe.launch.variables import aliases, values_of

__all__ = ["Layer", "Layered", "collect", "split_arguments"]

_SELECTORS = ("recipe", "cluster", "run")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Hold what one layer says.

    Args:
        name: as --show-origin prints it.
        values: by flat key, as written.
        sources: where within the layer, by key: a variable's name.
    """

    name: str
    values: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Say where the layer's value of a key stands."""
        source = self.sources.get(key)
        return self.name if source is None else f"{self.name} {source}"


@dataclass(frozen=True, kw_only=True)
class Layered:
    """Hold the value of every setting, and which layer gave it.

    Args:
        values: by flat key; every key of ``SETTINGS`` is there.
        origins: the layer of each, in words.
        ranks: its place among the layers, lowest first.
        raw_flags: words after ``--``, last of all flags.
        notes: sentences about what was given and does nothing, or other than it seems to.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    ranks: dict[str, int]
    raw_flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        """Read the value of a setting."""
        return self.values[key]

    def map(self, name: str) -> dict[str, Any]:
        """Collect the entries of a map, by their own names."""
        start = f"{name}."
        found = {
            key.removeprefix(start): value for key, value in self.values.items() if key.startswith(start)
        }
        return {key: value for key, value in found.items() if value is not None}


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split a command line into ``key=value`` and the raw flags after ``--``.

    The first word without ``=`` is the recipe.

    Raises:
        ConfigError: a word is neither, or a key is given twice.
    """
    own, raw = list(arguments), tuple[str, ...]()
    if "--" in own:
        cut = own.index("--")
        own, raw = own[:cut], tuple(own[cut + 1 :])
    values: dict[str, str] = {}
    problems = []
    for index, word in enumerate(own):
        key, equals, value = word.partition("=")
        if not equals and index == 0 and not word.startswith("-"):
            key, value = "recipe", word
        elif not equals or key.startswith("-"):
            problems.append(f"{word!r} is no key=value; flags of fairseq-train come after a --.")
            continue
        key = spelled(key)
        if key in values:
            problems.append(f"{key} is given twice, as {values[key]!r} and {value!r}; leave one out.")
        values[key] = value
    if problems:
        raise ConfigError(problems)
    return values, raw


def collect(arguments: Sequence[str], environ: Mapping[str, str]) -> Layered:
    """Read all layers and put them on top of one another.

    Lowest first: built in, recipe, cluster, run, environment, command line.

    Args:
        arguments: the command line, without the program's name.
        environ: the environment.

    Raises:
        ConfigError: every key that there is not, and every value that cannot be read.
    """
    given, raw_flags = split_arguments(arguments)
    read = values_of(environ)
    problems = list(read.problems)
    command_line = Layer(name="command line", values=given)
    environment = Layer(name="environment", values=read.values, sources=read.sources)
    built_in = {key: setting.default for key, setting in SETTINGS.items()}
    files = _files([environment, command_line], environ, problems)
    layers = [*files, environment, command_line]
    values, origins = dict(built_in), dict.fromkeys(built_in, "built in")
    ranks = dict.fromkeys(built_in, 0)
    for rank, layer in enumerate(layers, start=1):
        for key, written in layer.values.items():
            problem = key_problem(key, aliases=aliases()) or (
                f"{key} cannot be set in a {layer.name.split()[0]} file." if _nested(layer, key) else None
            )
            if problem is not None:
                problems.append(_located(layer, key, problem))
                continue
            try:
                value = built_in.get(key) if written in (None, "") else read_value(key, written, environ)
            except ValueError as error:
                problems.append(_located(layer, key, str(error)))
                continue
            values[key], origins[key], ranks[key] = value, layer.origin(key), rank
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Layered(values=values, origins=origins, ranks=ranks, raw_flags=raw_flags, notes=tuple(read.notes))


def _located(layer: Layer, key: str, problem: str) -> str:
    return f"{layer.origin(key)}: {problem}"


def _nested(layer: Layer, key: str) -> bool:
    """Tell whether a file names a file of its own layer or of one that is read before it."""
    kind = layer.name.split()[0]
    return key in _SELECTORS and kind in _SELECTORS and not (kind == "run" and key != "run")


def _files(above: Sequence[Layer], environ: Mapping[str, str], problems: list[str]) -> list[Layer]:
    """Read the files that the layers above name; a run's file may name the recipe and the cluster."""
    found: dict[str, Layer] = {}
    for kind in ("run", "recipe", "cluster"):
        naming = [found["run"], *above] if "run" in found else list(above)
        named = [layer.values[kind] for layer in naming if layer.values.get(kind) not in (None, "")]
        if not named:
            continue
        try:
            path = find_file(kind, read_value(kind, named[-1], environ))
            found[kind] = Layer(name=f"{kind} {path.name}", values=read_yaml(path))
        except ValueError as error:
            problems.append(str(error))
    return [found[kind] for kind in _SELECTORS if kind in found]
