"""Find commands in docs/, so that tests run what is printed there."""

import shlex
from pathlib import Path

__all__ = ["documented_command", "documented_training"]

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def documented_command(page: str, command: str) -> list[str]:
    """Find the arguments of the one line of a page that runs ``fairseq-moe-convert`` with this command."""
    start = f"fairseq-moe-convert {command} "
    lines = (_DOCS / page).read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(start))
    return shlex.split(line)[1:]


def documented_training(page: str) -> list[str]:
    """Find the arguments of the one command of a page that runs fairseq-train under torchrun."""
    text = (_DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith("torchrun "))
    return shlex.split(line.partition("$(which fairseq-train)")[2])
