"""Log lines of every command have stock's format and level; a program that has set up logging keeps its own."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import PLUGIN, eval_lm_argv, train_argv
from tests.e2e.processes import console_script, run_process
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

_STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (INFO|WARNING) \| "
_PLAIN = r"^(?:DEBUG|INFO|WARNING):(?!fairseq\.tasks\.text_to_speech)fairseq"  # that one speaks before any command does


def _argv(command: str, data: Path, checkpoint: Path, folder: Path) -> list[Any]:
    (folder / "input.txt").write_text("the value of\n")
    common = [data, *PLUGIN, "--cpu", "--path", checkpoint, "--task", "language_modeling"]
    made: dict[str, list[Any]] = {
        "train": train_argv(data, folder, "--max-update", "1", "--no-save"),
        "eval_lm": eval_lm_argv(data, checkpoint),
        "validate": [*common, "--batch-size", "1", "--valid-subset", "valid"],
        "interactive": [*common, "--input", folder / "input.txt", "--beam", "1", "--max-len-b", "6"],
        "generate": [*common, "--gen-subset", "valid", "--tokens-per-sample", "32", "--beam", "1"],
    }
    return made[command]


def _lines(result: CommandResult) -> tuple[int, int]:
    """Log lines with stock's format, and without any."""
    assert result.exit_code == 0, result.output[-3000:]
    stamped = re.findall(rf"^{_STAMP}", result.output, flags=re.MULTILINE)
    return len(stamped), len(re.findall(_PLAIN, result.output, flags=re.MULTILINE))


@pytest.mark.parametrize("command", ["train", "eval_lm", "validate", "interactive", "generate"])
def test_commands_log_in_stocks_format(
    command: str, text_data: Path, moe_checkpoint: Path, tmp_path: Path
) -> None:
    """The start does first what an import inside fairseq does before the command sets up logging."""
    argv = [f"fairseq_cli.{command}", *_argv(command, text_data, moe_checkpoint, tmp_path)]
    stamped, plain = _lines(run_cli("tests.e2e.starts", argv, function="after_debug_logging"))
    assert stamped >= 3
    assert plain == 0


def test_level_is_that_of_the_environment(text_data: Path, moe_checkpoint: Path, tmp_path: Path) -> None:
    argv = ["fairseq_cli.interactive", *_argv("interactive", text_data, moe_checkpoint, tmp_path)]
    result = run_cli("tests.e2e.starts", argv, function="after_debug_logging", env={"LOGLEVEL": "error"})
    assert _lines(result) == (0, 0)
    assert "H-0\t" in result.output


def test_installed_command_logs_in_stocks_format_on_the_same_stream(
    text_data: Path, moe_checkpoint: Path, tmp_path: Path
) -> None:
    argv = _argv("interactive", text_data, moe_checkpoint, tmp_path)
    script = '"$0" "$@" 2> log.txt > out.txt'
    run = run_process("bash", "-c", script, console_script("fairseq-interactive"), *argv, cwd=tmp_path)
    assert run.exit_code == 0, (tmp_path / "log.txt").read_text()[-3000:]
    log, out = (tmp_path / "log.txt").read_text(), (tmp_path / "out.txt").read_text()
    assert re.search(rf"^{_STAMP}fairseq_cli.interactive \| loading model", log, flags=re.MULTILINE)
    assert not re.search(r"^(DEBUG|INFO):fairseq_cli", log, flags=re.MULTILINE)
    assert re.search("^H-0\t", out, flags=re.MULTILINE) and " | INFO | " not in out


def test_program_that_has_set_up_logging_keeps_its_format() -> None:
    assert run_ranks(_kept_formats, 1) == [["%(message)s", "%(levelname)s:%(name)s:%(message)s", "changed"]]


def _kept_formats(rank: int) -> list[str]:
    import logging

    import fairseq_moe  # noqa: F401
    from fairseq_moe.stock.start.log_format import use_stock_log_format

    found = []
    for settings in ({"format": "%(message)s", "level": "DEBUG"}, {"level": "INFO"}, {"level": "DEBUG"}):
        logging.basicConfig(**settings, force=True)  # type: ignore[arg-type]
        use_stock_log_format()
        (handler,) = logging.getLogger().handlers
        assert handler.formatter is not None
        found.append(str(handler.formatter._fmt))
    found[2] = "changed" if found[2].startswith("%(asctime)s | ") else found[2]
    return found
