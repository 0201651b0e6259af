"""The process that has spawned the ranks passes signals on and ends when they do; no rank is left behind."""

import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.commands import train_argv
from tests.e2e.processes import console_script, start_process
from tests.helpers.ranks import run_ranks


def _save_and_stop(seconds: float) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    time.sleep(seconds)
    sys.exit(1)


def _end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))


def _stop_for_ever() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _wait_for(rank: int, bodies: list[tuple[Any, tuple[Any, ...]]], term_after_sec: float | None) -> Any:
    """What ``wait_for`` ends with: an exit code, and how the processes ended."""
    import fairseq_moe.stock.start.spawned as spawned

    spawned._GRACE_SEC = 1.0
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=body, args=args) for body, args in bodies]
    for process in processes:
        process.start()
    if term_after_sec is not None:
        context.Process(target=_signal_later, args=(os.getpid(), term_after_sec), daemon=True).start()
    code = 0
    try:
        spawned.wait_for(SimpleNamespace(processes=processes))
    except SystemExit as stop:
        code = stop.code
    return code, [process.exitcode for process in processes]


def _signal_later(pid: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(pid, signal.SIGTERM)


def test_sigterm_reaches_all_ranks_and_ends_well() -> None:
    bodies = [(_save_and_stop, (30.0,))] * 2
    assert run_ranks(_wait_for, 1, bodies, 0.5) == [(0, [0, 0])]


@pytest.mark.parametrize(("how", "code"), [("killed", 128 + signal.SIGKILL), ("3", 3), ("2", 2)])
def test_the_exit_code_is_that_of_the_first_rank_that_failed(how: str, code: int) -> None:
    bodies = [(_stop_for_ever, ()), (_end, (how,))]
    own = -signal.SIGKILL if how == "killed" else code
    assert run_ranks(_wait_for, 1, bodies, None) == [(code, [-signal.SIGKILL, own])]


class _EndsWhenAsked:
    """A failed rank that is still running when its exit code is asked for the first time."""

    def __init__(self) -> None:
        self._asked = 0
        self._read, write = os.pipe()
        os.close(write)  # the sentinel of a process that has ended can be read

    sentinel = property(lambda self: self._read)

    @property
    def exitcode(self) -> int | None:
        self._asked += 1
        return None if self._asked == 1 else 3

    def join(self, timeout: float) -> None:
        """It has ended."""

    def is_alive(self) -> bool:
        """It has ended."""
        return False


def _wait_for_one_that_ends_meanwhile(rank: int) -> int:
    import fairseq_moe.stock.start.spawned as spawned

    spawned._GRACE_SEC = 0.2
    stuck = multiprocessing.get_context("fork").Process(target=_stop_for_ever)
    stuck.start()
    with pytest.raises(SystemExit) as stop:
        spawned.wait_for(SimpleNamespace(processes=[_EndsWhenAsked(), stuck]))
    return int(stop.value.code)  # type: ignore[arg-type]


def test_a_rank_that_ends_while_it_is_looked_at_is_seen() -> None:
    assert run_ranks(_wait_for_one_that_ends_meanwhile, 1, timeout=30.0) == [3]


@pytest.mark.slow
@pytest.mark.slow_reliability
def test_sigterm_to_the_command_saves_on_two_real_ranks_and_exits_with_0(
    text_data: Path, tmp_path: Path
) -> None:
    argv = train_argv(text_data, tmp_path / "save", "--disable-validation", "--no-epoch-checkpoints")
    argv += ["--max-update", "100000", "--distributed-world-size", "2"]
    process = start_process(console_script("fairseq-train"), *argv, cwd=tmp_path)
    try:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "train_inner" in line:
                os.killpg(process.pid, signal.SIGTERM)  # as SLURM does: to the command and its ranks alike
                break
        rest, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    output = "".join(lines) + rest
    assert process.returncode == 0, output[-3000:]
    saved = re.findall(r"Saved checkpoint \S*/(\S+) \(epoch \d+ @ (\d+) updates", output)
    stopped = re.findall(r"training stops after update (\d+): SIGTERM", output)
    assert len(stopped) == 1
    assert saved[-1] == ("checkpoint_last.pt", stopped[0])
