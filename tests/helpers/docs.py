"""Find commands in docs/, so that tests run what is printed there."""

import shlex
from pathlib import Path

__all__ = ["documented_command", "documented_line", "documented_training"]

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def documented_command(page: str, command: str) -> list[str]:
    """Find the arguments of the one line of a page that runs ``fairseq-moe-convert`` with this command."""
    return [command, *documented_line(page, f"fairseq-moe-convert {command}")]


def documented_line(page: str, start: str) -> list[str]:
    """Find the arguments behind ``start`` of the one line of a page that begins so."""
    lines = (_DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{start} "))
    return shlex.split(line.removeprefix(start))


def documented_training(page: str) -> list[str]:
    """Find the arguments of the one command of a page that runs fairseq-train under torchrun."""
    text = (_DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith("torchrun "))
    return shlex.split(line.partition("$(which fairseq-train)")[2])
