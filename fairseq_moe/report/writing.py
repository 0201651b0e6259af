"""Write a run's page, once or anew while it goes on."""

import importlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairseq_moe.errors import MoEError
from fairseq_moe.report.facts import Facts, cards_of, facts_of
from fairseq_moe.report.files import RunFiles, find_files, read_text

__all__ = ["REPORT_NAME", "watch", "write_report"]

REPORT_NAME = "report.html"
_IDLE_SEC = 1800.0  # after so long without a change a job has ended, or hangs


def write_report(run_dir: Path, *, logs: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the page of a run, whatever of it there is.

    Args:
        run_dir: a run directory, or a --save-dir of fairseq.
        logs: files with the log; none: those in the directory.
        output: the page's file; None: ``report.html`` in the directory.

    Returns:
        the page's file.

    Raises:
        MoEError: training has written nothing there, the page cannot be written, or matplotlib is not installed.
    """
    files = find_files(run_dir, logs)
    facts = facts_of(files)
    if facts.is_empty:
        raise _nothing(files)
    return _write(files, facts, output, refresh_sec=None)


def watch(
    run_dir: Path,
    *,
    logs: Sequence[Path] = (),
    output: Path | None = None,
    every_sec: float,
    told: Callable[[Path], None],
    idle_sec: float = _IDLE_SEC,
) -> str:
    """Write the page anew whenever something has changed, until training has ended.

    Args:
        run_dir, logs, output: as for ``write_report``.
        every_sec: pause between two looks, which is also when browsers read the page anew.
        told: called with the page's file after each time.
        idle_sec: training counts as ended when nothing has changed for so long.

    Returns:
        one sentence that says why it has ended.

    Raises:
        MoEError: as ``write_report``, but for a run that has written nothing yet.
    """
    seen, started_sec = -1.0, time.time()
    while True:
        files = find_files(run_dir, logs)
        changed_sec = files.changed_at_sec()
        facts = facts_of(files) if changed_sec != seen else None
        if facts is not None and not facts.is_empty:
            has_ended = facts.log.has_ended
            told(_write(files, facts, output, refresh_sec=None if has_ended else max(1, round(every_sec))))
            if has_ended:
                return "Training has ended."
        seen = changed_sec
        if time.time() - max(changed_sec, started_sec) > idle_sec:
            if facts_of(files).is_empty:
                raise _nothing(files)
            write_report(run_dir, logs=logs, output=output)
            return f"Nothing has changed for {idle_sec:,.0f} s: the job has ended, or hangs."
        time.sleep(every_sec)


def _nothing(files: RunFiles) -> MoEError:
    return MoEError(
        f"{files.run_dir} holds no line of fairseq's JSON log and no record of the experts' load; train with "
        "--log-format json and a --log-file in it, or name the log with --log FILE."
    )


def _write(files: RunFiles, facts: Facts, output: Path | None, *, refresh_sec: int | None) -> Path:
    page, sections = _drawing("page"), _drawing("sections")
    made = page.Page(
        name=files.run_dir.resolve().name,
        written=time.strftime("written on %Y-%m-%d at %H:%M:%S"),
        cards=cards_of(facts),
        sections=sections.sections_of(facts),
        problems=facts.problems,
        traces=[path.name for path in files.traces],
        texts=[(path.name, read_text(path)) for path in files.texts],
        refresh_sec=refresh_sec,
    )
    path = files.run_dir / REPORT_NAME if output is None else output
    if path.is_dir():
        raise MoEError(f"the page cannot be written to {path}, which is a directory; name a file in it.")
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(page.render(made), encoding="utf-8")
        half.replace(path)
    except OSError as error:
        raise MoEError(f"the page cannot be written to {path}: {error}.") from None
    return path


def _drawing(name: str) -> Any:
    """Import a module that needs matplotlib, which is an extra."""
    try:
        return importlib.import_module(f"fairseq_moe.report.{name}")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise MoEError("this needs matplotlib; install it with: pip install 'fairseq_moe[inspect]'") from None
