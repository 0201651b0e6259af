"""R25: two runs never write to one save directory, and the lock of a killed run blocks nobody."""

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.stock.step import lock
from fairseq_moe.stock.step.lock import LOCK_NAME, SaveDirectoryError, lock_save_directory
from tests.e2e.commands import train_argv
from tests.helpers.ranks import run_cli

_FORK = multiprocessing.get_context("fork")


def _hold(folder: str, ready: Any, *, with_worker: bool) -> None:
    lock_save_directory(folder)
    if with_worker:  # as a data loader's, which does not notice at once that this process is gone
        _FORK.Process(target=time.sleep, args=(20,)).start()
    ready.send(os.getpid())
    time.sleep(60)


@pytest.fixture
def owner(tmp_path: Path) -> Any:
    """Another process that holds the lock of ``tmp_path``; it ends with the test."""
    started: list[Any] = []

    def start(*, with_worker: bool = False) -> Any:
        ready, its_end = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_own_group, args=(str(tmp_path), its_end, with_worker))
        process.start()
        started.append(process)
        assert ready.poll(20)
        assert ready.recv() == process.pid
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _own_group(folder: str, ready: Any, with_worker: bool) -> None:
    os.setsid()
    _hold(folder, ready, with_worker=with_worker)


def test_a_second_run_is_refused_and_told_whose_directory_it_is(owner: Any, tmp_path: Path) -> None:
    process = owner()
    with pytest.raises(SaveDirectoryError, match=f"in use by another training run .process {process.pid} on"):
        lock_save_directory(tmp_path)


@pytest.mark.parametrize("with_worker", [False, True])
def test_the_lock_of_a_killed_owner_is_free_at_once(owner: Any, tmp_path: Path, with_worker: bool) -> None:
    process = owner(with_worker=with_worker)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lock_save_directory(tmp_path)
    assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
    lock_save_directory(tmp_path)  # this process has it


def test_this_test_sees_a_lock_that_workers_inherit(
    owner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.os, "register_at_fork", lambda **kwargs: None)
    process = owner(with_worker=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(SaveDirectoryError):
        lock_save_directory(tmp_path)


def test_all_ranks_of_the_second_run_end_with_the_same_sentence(
    owner: Any, text_data: Path, tmp_path: Path
) -> None:
    process = owner()
    result = run_cli("fairseq_cli.train", train_argv(text_data, tmp_path), world_size=2)
    assert result.exit_codes == [2, 2]
    assert result.output.count("fairseq_moe: error: ") == 1
    assert f"is in use by another training run (process {process.pid} on" in result.outputs[0]
    assert [entry.name for entry in tmp_path.iterdir()] == [LOCK_NAME]
    no_save = run_cli("fairseq_cli.train", train_argv(text_data, tmp_path, "--no-save", "--max-update", "1"))
    assert no_save.exit_code == 0, no_save.output[-3000:]
