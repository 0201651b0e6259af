"""Signals while a conversion writes: a real process leaves no directory behind and exits with 128 + n."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fairseq_moe.convert import from_hf
from fairseq_moe.convert.cli import main
from fairseq_moe.convert.directories import appearing
from fairseq_moe.convert.stopping import Stopped, stopped_by_signals
from tests.helpers.ranks import REPOSITORY, run_ranks

Models = Callable[..., Path]
VOCABULARY = 100_000  # 26 MB, which take a while to be written
DEADLINE_SEC = 60.0


def _signal_while_it_writes(process: int, target: Path, number: int) -> int:
    """Send a signal when the process has begun to fill ``target``; returns its exit code, minus what has killed it."""
    deadline = time.monotonic() + DEADLINE_SEC
    while not list(target.parent.glob(f".{target.name}.tmp-*/{target.name}/**/*.safetensors*")):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "it has ended before it wrote"
        assert time.monotonic() < deadline
    os.kill(process, signal.SIGSTOP)  # it stays in the middle until the signal has reached it
    assert not target.exists()
    os.kill(process, number)
    os.kill(process, signal.SIGCONT)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _check(directory: Path, exit_code: int, log: Path, number: signal.Signals) -> None:
    assert exit_code == 128 + number
    assert list(directory.iterdir()) == []
    assert log.read_text().splitlines()[-1].rpartition("\r")[2] == (
        f"fairseq_moe.convert: stopped by {number.name}; no incomplete directory is left."
    )
    assert "Traceback" not in log.read_text()


def _stop_forks(rank: int, source: Path, folder: Path) -> None:
    """Stop each command with one of the signals, in a fork of this process."""
    ours = from_hf(source, folder / "ours").target.parent
    for command, origin, number in (("from-hf", source, signal.SIGTERM), ("to-hf", ours, signal.SIGINT)):
        directory, log = folder / command, folder / f"{command}.log"
        directory.mkdir()
        argv = [command, str(origin), "--to", str(directory / "target")]
        process = os.fork()
        if process == 0:
            with log.open("w") as file:
                os.dup2(file.fileno(), 2)
                os._exit(main(argv))
        code = _signal_while_it_writes(process, directory / "target", number)
        _check(directory, code, log, number)


def test_a_signal_leaves_nothing_behind(hf_model: Models, tmp_path: Path) -> None:
    source = hf_model("mixtral", config_vocab_size=VOCABULARY)
    run_ranks(_stop_forks, 1, source, tmp_path, timeout=DEADLINE_SEC)


@pytest.mark.slow
def test_the_command_on_the_command_line_too(hf_model: Models, tmp_path: Path) -> None:
    source, directory = hf_model("mixtral", config_vocab_size=VOCABULARY), tmp_path / "new"
    directory.mkdir()
    argv = [sys.executable, "-m", "fairseq_moe.convert", "from-hf", str(source)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*argv, "--to", str(directory / "target")], cwd=REPOSITORY, stderr=log)
        try:
            code = _signal_while_it_writes(process.pid, directory / "target", signal.SIGTERM)
        finally:
            process.kill()
    _check(directory, code, tmp_path / "log", signal.SIGTERM)


def test_the_commands_handlers_are_gone_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main(["from-hf", str(tmp_path / "absent"), "--to", str(tmp_path / "target")]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def _fail_while_filling(target: Path) -> None:
    with appearing(target) as filling:
        (filling / "file").write_text("x")
        raise ZeroDivisionError


def test_a_signal_while_it_cleans_up_does_not_keep_it_from_doing_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of the removal that follows an error."""
    remove = shutil.rmtree

    def slow(path: Path, ignore_errors: bool) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was overlooked")

    monkeypatch.setattr(shutil, "rmtree", slow)
    with pytest.raises(Stopped), stopped_by_signals():
        _fail_while_filling(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []
