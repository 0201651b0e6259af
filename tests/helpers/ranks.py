"""Run ranks and fairseq commands in forked processes.

Importing torch and fairseq takes about six seconds, so a fork server imports them once per test session and
every rank or command is a fork of it. The server has not imported fairseq_moe: a command without --user-dir
runs plain stock fairseq. Nothing waits forever: a call that is not done at its deadline dumps the stacks of
its processes, ends them and fails.
"""

import atexit
import datetime
import faulthandler
import functools
import gc
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

__all__ = ["REPOSITORY", "USER_DIR", "CommandResult", "RankError", "run_cli", "run_ranks"]

REPOSITORY = Path(__file__).resolve().parents[2]
USER_DIR = REPOSITORY / "fairseq_moe"

_PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "fairseq.trainer",
    "fairseq.options",
    "pytest",
]
_LOG_TAIL_CHARS = 3000
_GRACE_SEC = 3.0  # what the others get to report their own end after a rank has failed


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message holds tracebacks and the ends of logs."""


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """Exit codes, output and times of a command that has ended.

    Args:
        exit_codes: of each rank; minus the number of the signal that has killed it.
        outputs: standard output and error together, of each rank.
        ended_sec: when each rank ended, by a clock of no particular start; empty for real processes.
    """

    exit_codes: list[int]
    outputs: list[str]
    ended_sec: list[float] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Find the first exit code that is not 0; 0 if there is none."""
        return next((code for code in self.exit_codes if code != 0), 0)

    @property
    def output(self) -> str:
        """Join all ranks' output, one rank after the other."""
        return "".join(self.outputs)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run ``fn(rank, *args)`` on ``world_size`` gloo ranks and return what each returned, in rank order.

    With one rank there is no process group, as in a single fairseq process.

    Args:
        fn: a function at the top level of a module (it is pickled by name).
        world_size: number of ranks.
        args: picklable arguments.
        timeout: deadline of the whole call, in seconds; also the timeout of every collective.

    Raises:
        RankError: a rank raised, died, or was not done at the deadline.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        children = [
            _Child(_rank_body, (fn, rank, world_size, args, folder, timeout), folder, rank, timeout)
            for rank in range(world_size)
        ]
        return _join(children, timeout)


def run_cli(
    module: str,
    argv: Sequence[Any],
    *,
    world_size: int = 1,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 100.0,
    function: str = "cli_main",
    may_die: bool = False,
) -> CommandResult:
    """Run a command such as ``fairseq_cli.train`` in a forked process, without a new interpreter.

    Args:
        module: the module that holds the command's entry point.
        argv: arguments without the program's name; each is turned into a string.
        world_size: above 1, so many processes are started with the environment that torchrun gives its ranks.
        cwd: working directory (default: this one).
        env: variables to set on top of the environment.
        timeout: deadline of the whole call, in seconds.
        function: the entry point.
        may_die: a process that is killed is a result too.

    Raises:
        RankError: a process was killed (see ``may_die``) or was not done at the deadline. A command that fails with an
            exception or an exit code is a result.
    """
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        children = []
        port = _free_port()
        for rank in range(world_size):
            variables = dict(env or {})
            if world_size > 1:
                variables |= _torchrun_variables(rank, world_size, port)
            body_args = (module, function, [str(arg) for arg in argv], str(cwd or os.getcwd()), variables)
            children.append(_Child(_command_body, body_args, folder, rank, timeout))
        codes = _join(children, timeout, is_result=lambda code: may_die or code > 0)
        return CommandResult(
            exit_codes=codes,
            outputs=[child.log() for child in children],
            ended_sec=[child.ended_sec for child in children],
        )


class _Child:
    """A forked process that reports one message: its result, or its traceback."""

    def __init__(
        self, body: Callable[..., Any], args: tuple[Any, ...], folder: str, index: int, timeout: float
    ) -> None:
        self.index = index
        self.ended_sec = 0.0
        self._log_file = Path(folder) / f"log-{index}"
        self.connection, its_end = multiprocessing.connection.Pipe(duplex=False)
        self.process = _fork_context().Process(
            target=_child_main, args=(body, args, its_end, str(self._log_file), timeout)
        )
        self.process.start()
        its_end.close()

    def log(self) -> str:
        return self._log_file.read_text(errors="replace") if self._log_file.exists() else ""

    def receive(self, is_result: Callable[[int], bool]) -> tuple[bool, Any]:
        """Receive (True, result) or (False, why there is none).

        Args:
            is_result: tells whether the exit code of a process that has ended without a message is its result.
        """
        self.ended_sec = time.monotonic()
        try:
            message: tuple[bool, Any] = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self.process.join(_GRACE_SEC)
            code = self.process.exitcode
            if code is not None and is_result(code):
                return True, code
            return False, f"died with exit code {code}"
        return message

    def end(self) -> None:
        """Kill what is left of it, its own children included, and wait for it."""
        if self.process.pid is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not reached setsid yet
                self.process.kill()
        self.process.join()
        self.connection.close()


def _join(
    children: list[_Child], timeout: float, *, is_result: Callable[[int], bool] = lambda code: False
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting: dict[Any, _Child] = {child.connection: child for child in children}
    deadline = time.monotonic() + timeout + 1.0  # the processes dump their stacks at timeout
    try:
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(child.index for child in waiting.values())
                failures.append(f"ranks {late} were not done after {timeout:g} s")
                break
            for connection in ready:
                child = waiting.pop(connection)
                ok, value = child.receive(is_result)
                if ok:
                    results[child.index] = value
                    continue
                failures.append(f"rank {child.index}: {value}")
                deadline = min(deadline, time.monotonic() + _GRACE_SEC)
        if not failures:
            for child in children:
                child.process.join(_GRACE_SEC)
    finally:
        for child in children:
            child.end()
    if failures:
        logs = [f"--- end of the log of rank {c.index}:\n{c.log()[-_LOG_TAIL_CHARS:]}" for c in children]
        raise RankError("\n".join(failures + logs))
    return [results[index] for index in range(len(children))]


@functools.cache
def _fork_context() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"  # the server inherits it; threads do not survive a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _child_main(
    body: Callable[..., Any], args: tuple[Any, ...], connection: Any, log_file: str, timeout: float
) -> NoReturn:
    gc.freeze()  # a collection would touch, and so copy, all that the server has imported
    os.setsid()  # so that its own children can be ended with it
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.dump_traceback_later(timeout, exit=True)
    torch.set_num_threads(1)
    logging.getLogger().handlers.clear()  # the server's imports have left some
    multiprocessing.set_start_method(
        None, force=True
    )  # not the fork server: data workers start as they do elsewhere
    try:
        message = (True, body(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(pickle.dumps(message))
    connection.close()
    os.killpg(0, signal.SIGKILL)  # ends itself and what it has started; no destructor waits for another rank
    raise AssertionError("unreachable")


def _rank_body(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: str, timeout: float
) -> Any:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.manual_seed(0)
    random.seed(0)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
    result = fn(rank, *args)
    if world_size > 1:
        dist.barrier()  # nobody leaves while others still read from it
    return result


def _command_body(module: str, function: str, argv: list[str], cwd: str, env: dict[str, str]) -> int:
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [module, *argv]
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()  # data workers are ended and logs flushed, as at an interpreter's end
    return 0


def _torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
