"""Quote words for bash, and lay a command out so that people can read it."""

import shlex
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["command_array", "command_text", "exports", "flag_value", "quoted"]


def quoted(words: Iterable[str]) -> str:
    """Write words so that bash reads the same ones, on one line where none holds a line break."""
    return " ".join(shlex.quote(word) for word in words)


def command_array(command: Sequence[str]) -> list[str]:
    """Write lines that give bash an array ``command`` with exactly these words."""
    return ["command=(", *(f"  {line}" for line in _lines(command)), ")"]


def command_text(command: Sequence[str]) -> str:
    """Write a command as it could be typed, a flag a line, with a line break at the end."""
    return " \\\n  ".join(_lines(command)) + "\n"


def exports(variables: Mapping[str, str]) -> list[str]:
    """Write lines that set variables for all that the script starts."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def flag_value(command: Sequence[str], flag: str) -> str | None:
    """Find the value that counts of a flag, the last one; None where it is not given."""
    value = None
    for word, following in zip(command, [*command[1:], None], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def _lines(command: Sequence[str]) -> list[str]:
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return [quoted(line) for line in lines if line]
