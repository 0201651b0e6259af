"""fairseq-train with a signal to itself at a chosen call: an entry point for ``run_cli``."""

import functools
import hashlib
import importlib
import os
import signal
from collections.abc import Callable
from typing import Any

__all__ = ["SIGNAL_AT", "signal_at", "train"]

SIGNAL_AT = "TEST_SIGNAL_AT"


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
    for parameter in trainer.get_model().parameters():
        digest.update(parameter.detach().numpy().tobytes())
        for _, value in sorted(trainer.optimizer.optimizer.state[parameter].items()):
            digest.update(value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode())
    return digest.hexdigest()
