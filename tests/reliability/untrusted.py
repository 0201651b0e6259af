"""Good checkpoints to spoil, and what every command that loads them says (R10)."""

import contextlib
import functools
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.e2e.commands import PLUGIN, eval_lm_argv, train_argv
from tests.helpers.ranks import run_ranks

__all__ = [
    "COMMANDS",
    "EVAL",
    "Copy",
    "Payload",
    "Spoilt",
    "assert_refused",
    "attempts",
    "change_main",
]

COMMANDS = ("train", "eval_lm", "generate", "interactive", "validate")
EVAL = ("eval_lm",)

# Makes a copy of a good checkpoint under a name and gives its main file: the fixture ``copy``.
Copy = Callable[[str], Path]


class Payload:
    """Unpickling it makes a directory, the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.marker), 0o777, True)


@dataclass(frozen=True, kw_only=True)
class Spoilt:
    """A file to try.

    Args:
        main: the main file.
        named: what a refusal has to name.
        commands: which try it; ``from_pretrained`` always does.
    """

    main: Path
    named: Any
    commands: tuple[str, ...] = ()


def _argv(command: str, data: Path, main: Path) -> list[Any]:
    if command == "train":
        flags = ("--restore-file", main, "--disable-validation", "--max-update", 2)
        return train_argv(data, main.parent / "new", *flags)
    if command == "eval_lm":
        return eval_lm_argv(data, main)
    argv = [data, *PLUGIN, "--cpu", "--path", main, "--task", "language_modeling", "--num-workers", 0]
    if command == "interactive":
        return argv
    argv += ["--batch-size", 1, "--tokens-per-sample", 30, "--sample-break-mode", "none"]
    return [*argv, "--gen-subset", "valid"] if command == "generate" else argv


def _attempts(rank: int, data: Path, files: Mapping[str, Spoilt], mutation: str) -> dict[str, dict[str, str]]:
    MUTATIONS[mutation]()
    found: dict[str, dict[str, str]] = {}
    for case, spoilt in files.items():
        found[case] = {}
        for command in spoilt.commands:
            sys.argv = [command, *map(str, _argv(command, data, spoilt.main))]
            sys.stdin = io.StringIO("the\n")
            module = importlib.import_module(f"fairseq_cli.{command}")
            found[case][command] = _outcome(module.cli_main)
        found[case]["from_pretrained"] = _outcome(functools.partial(_from_pretrained, data, spoilt.main))
    return found


def _outcome(call: Callable[[], Any]) -> str:
    from fairseq_moe.errors import MoEError

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            call()
        except MoEError as error:
            return f"refused: {error}"
        except SystemExit as stop:
            return ("refused: " if stop.code == 2 else f"exit code {stop.code}: ") + said.getvalue()
        except Exception:
            return "stack trace: " + traceback.format_exc()[-800:]
    return "loaded"


def _from_pretrained(data: Path, main: Path) -> Any:
    from fairseq.models.transformer_lm import TransformerLanguageModel

    import fairseq_moe  # noqa: F401

    return TransformerLanguageModel.from_pretrained(
        str(main.parent), main.name, data_name_or_path=str(data), cpu=True
    )


def _unpickle_everything() -> None:
    stock_load = torch.load
    torch.load = lambda *args, **kwargs: stock_load(*args, **{**kwargs, "weights_only": False})


def _take_programs() -> None:
    import fairseq_moe.stock.checkpoint.untrusted as untrusted

    untrusted.refuse_programs = lambda cfg: None


MUTATIONS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "unpickle everything": _unpickle_everything,
    "take programs": _take_programs,
}


def attempts(data: Path, files: Mapping[str, Spoilt], mutation: str = "") -> dict[str, dict[str, str]]:
    """By case and command, 'loaded', or 'refused: ' and what was said; all in one forked process.

    Args:
        data: as ``text_data``.
        files: by case.
        mutation: one of ``MUTATIONS``, a guard that is taken away.
    """
    found: dict[str, dict[str, str]] = run_ranks(_attempts, 1, data, dict(files), mutation, timeout=100)[0]
    return found


def assert_refused(data: Path, files: Mapping[str, Spoilt]) -> None:
    """Every command refuses its file with a sentence that names what it has to name."""
    for case, by_command in attempts(data, files).items():
        for command, said in by_command.items():
            assert said.startswith("refused: "), f"{case}, {command}: {said}"
            assert "Traceback" not in said, f"{case}, {command}: {said}"
            assert str(files[case].named) in said, f"{case}, {command}: {said}"


def change_main(main: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Load a good main file, let ``change`` spoil its dictionary, and write it as torch does."""
    state = torch.load(main, weights_only=True)
    change(state)
    torch.save(state, main)
