"""fairseq-train with a signal to itself, or without one of our guards, and others: entry points for ``run_cli``."""

import functools
import hashlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "PID_FOLDER",
    "SIGNAL_AT",
    "convert_in_small_pieces",
    "signal_at",
    "train",
    "train_then_be_killed",
    "train_until_a_user_error",
    "train_without",
]

SIGNAL_AT = "TEST_SIGNAL_AT"
PID_FOLDER = "TEST_PID_FOLDER"
_WATCH_SEC = 80.0


def signal_at(target: str, *, nth: int, ranks: list[int], name: str) -> dict[str, str]:
    """The environment in which ``train`` sends the signal ``name`` to itself before a call.

    Args:
        target: ``module:attribute.path`` of a function.
        nth: which call, from 1.
        ranks: the ranks that get the signal.
        name: SIGTERM or SIGUSR1.
    """
    return {SIGNAL_AT: f"{target} {nth} {','.join(map(str, ranks))} {name}"}


def train() -> None:
    """fairseq-train; at the end each rank prints a digest of its parameters and optimizer state."""
    import fairseq.trainer
    import fairseq_cli.train

    import fairseq_moe  # noqa: F401  (seams first: the signal comes before them)

    trainers: list[Any] = []
    _before(fairseq.trainer.Trainer, "train_step", lambda trainer, *args: trainers.append(trainer))
    if SIGNAL_AT in os.environ:
        target, nth, ranks, name = os.environ[SIGNAL_AT].split()
        if os.environ.get("RANK", "0") in ranks.split(","):
            _send_before(target, int(nth), signal.Signals[name])
    fairseq_cli.train.cli_main()
    print("digest", _digest(trainers[-1]))


def train_without() -> None:
    """As ``train``, without the guard that the first argument names."""
    import fairseq_moe.flags.stock as stock_flags
    import fairseq_moe.stock.start.ending as failing
    import fairseq_moe.stock.step.signals as signals
    import fairseq_moe.stock.step.training as training

    match sys.argv.pop(1):
        case "heartbeat":
            failing.Watchdog.of_this_process = lambda: None  # type: ignore[method-assign, assignment]
        case "end at out of memory":
            training.world_size = lambda: 1  # type: ignore[attr-defined]
        case "block check":
            stock_flags._block_problem = lambda cfg: []
        case "handlers":
            signals.Signals.listen = lambda self: None  # type: ignore[method-assign]
    train()


def train_until_a_user_error() -> None:
    """As ``train``; in the second update rank 1 alone meets an error that is the user's to mend."""
    import fairseq.trainer

    from fairseq_moe.errors import MoEError

    def refuse(trainer: Any, *args: Any) -> None:
        if trainer.data_parallel_rank == 1 and trainer.get_num_updates() == 1:
            raise MoEError("mend this.")

    _before(fairseq.trainer.Trainer, "clip_grad_norm", refuse)
    train()


def train_then_be_killed() -> None:
    """fairseq-train; a rank that has stopped itself is killed once all other ranks have ended."""
    import fairseq_cli.train

    folder = Path(os.environ[PID_FOLDER])
    (folder / str(os.getpid())).touch()
    if os.fork() == 0:
        try:
            _kill_when_alone(os.getppid(), folder)
        finally:
            os._exit(0)
    fairseq_cli.train.cli_main()


def _kill_when_alone(pid: int, folder: Path) -> None:
    deadline = time.monotonic() + _WATCH_SEC
    while time.monotonic() < deadline and os.getppid() == pid:
        time.sleep(0.1)
        others = [entry.name for entry in folder.iterdir() if entry.name != str(pid)]
        if others and not any(Path("/proc", other).exists() for other in others):
            os.kill(pid, signal.SIGKILL)
            return


def _before(owner: Any, name: str, action: Callable[..., Any]) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def _send_before(target: str, nth: int, number: signal.Signals) -> None:
    module, path = target.split(":")
    *parents, name = path.split(".")
    calls: list[int] = []

    def send(*args: Any) -> None:
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), number)

    _before(functools.reduce(getattr, parents, importlib.import_module(module)), name, send)


def _digest(trainer: Any) -> str:
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
        for _, value in sorted(trainer.optimizer.optimizer.state[parameter].items()):
            digest.update(value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode())
    return digest.hexdigest()


def convert_in_small_pieces() -> None:
    """Run fairseq-moe-convert, whose preprocess cuts text into pieces of 4 KiB."""
    from fairseq_moe.convert import cli
    from fairseq_moe.convert.text import pieces

    pieces._SMALLEST_BYTES = 1 << 12
    sys.exit(cli.main())
