"""How a rank ends when something goes wrong in it or in another rank: one sentence, the cause first, no waiting."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch.multiprocessing.spawn import ProcessExitedException

from fairseq_moe.distributed import (
    PEER_LOST_EXIT_CODE,
    Watchdog,
    is_collective_failure,
    leave_together,
    rank,
    set_collective_timeout,
    world_size,
)
from fairseq_moe.errors import ConfigError, MoEError
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.reliability import ReliabilityConfig
from fairseq_moe.stock.run import finish_profiles
from fairseq_moe.stock.seam import seam

__all__ = [
    "FIRST_UPDATE_TIMEOUTS",
    "USER_ERROR_EXIT_CODE",
    "current_watchdog",
    "failures_told",
    "has_experts",
    "one_sentence_errors",
]

USER_ERROR_EXIT_CODE = 2
_RANK_0_SPEAKS_SEC = 5.0
FIRST_UPDATE_TIMEOUTS = (
    3.0  # of --collective-timeout-sec: ranks load data, compile and connect at their own pace
)

# A ContextVar, because a rank may fail before it has a trainer, and in functions that are handed none.
_WATCHDOG: ContextVar[Watchdog | None] = ContextVar("watchdog", default=None)


def has_experts(cfg: Any) -> bool:
    """Tell whether a whole fairseq configuration asks for a model with experts."""
    model = getattr(cfg, "model", None)
    return model is not None and MoEConfig.from_args(model).enabled


def current_watchdog() -> Watchdog | None:
    """Get the watchdog of this rank; None for a single process or a dense model."""
    return _WATCHDOG.get()


@seam(
    "fairseq.distributed.utils:distributed_init",
    signature="(cfg)",
    stock_does="lets a collective wait for 30 minutes (gloo) or 10 (NCCL), and then names a port",
    breaks="when a rank dies or hangs, the others wait, and nobody learns which rank it was, or why",
    we_do="set --collective-timeout-sec, three times as long until the first update is done, and start the "
    "heartbeat by which ranks tell who is to blame",
    test="tests/reliability/test_r22_lost_rank.py",
)
def distributed_init(stock: Callable[..., Any], cfg: Any) -> int:
    own_rank = int(stock(cfg))
    if has_experts(cfg) and cfg.distributed_training.distributed_world_size > 1:
        config = ReliabilityConfig.from_args(cfg.model)
        set_collective_timeout(FIRST_UPDATE_TIMEOUTS * config.collective_timeout_sec)
        _WATCHDOG.set(Watchdog.of_this_process())
    return own_rank


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the process with the error's sentence when an error inside is the user's to mend."""
    try:
        yield
    except MoEError as error:
        _exit_with(error)
    except ProcessExitedException as error:
        if error.exit_code == USER_ERROR_EXIT_CODE:
            sys.exit(USER_ERROR_EXIT_CODE)  # the rank has said why
        raise
    finally:
        finish_profiles()


def _exit_with(error: MoEError) -> NoReturn:
    # Before the process group exists, ranks of torchrun and srun know their number from the environment.
    number = rank() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    if not (error.agreed and number > 0):
        sentences = error.problems if isinstance(error, ConfigError) else [str(error)]
        for sentence in sentences:
            print(f"fairseq_moe: error: {sentence}", file=sys.stderr, flush=True)
    elif world_size() == 1:
        # Launchers end all ranks at the first exit; rank 0 must have said why by then, and then ends us.
        time.sleep(_RANK_0_SPEAKS_SEC)
    if world_size() > 1:
        if error.agreed:
            leave_together(_RANK_0_SPEAKS_SEC)
        _wait_for_writers()
        finish_profiles()
        _exit_at_once(USER_ERROR_EXIT_CODE)
    sys.exit(USER_ERROR_EXIT_CODE)


@contextmanager
def failures_told() -> Iterator[None]:
    """End this rank when an error inside is not known to all ranks, and let the others know why."""
    try:
        yield
    except Exception as error:
        watchdog = _WATCHDOG.get()
        if watchdog is not None and not (isinstance(error, MoEError) and error.agreed):
            _end(watchdog, error)
        raise
    finally:
        watchdog = _WATCHDOG.get()
        if watchdog is not None:
            watchdog.stop()


def _end(watchdog: Watchdog, error: Exception) -> NoReturn:
    if is_collective_failure(error):
        verdict = watchdog.explain(error)
        _say(verdict.sentence, None if verdict.has_cause else error)
        code = PEER_LOST_EXIT_CODE
    elif isinstance(error, MoEError):
        _say(str(error))
        watchdog.accuse_self(str(error))
        code = USER_ERROR_EXIT_CODE
    else:
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        _say(f"this rank failed {watchdog.where}: {reason}", error)
        watchdog.accuse_self(reason)
        code = 1
    # A GPU would wait for the lost rank.
    if not (is_collective_failure(error) and torch.cuda.is_initialized()):
        finish_profiles()  # not before the others know why
    watchdog.let_others_read()
    _exit_at_once(code)


def _wait_for_writers() -> None:
    """Wait for threads that must end by themselves, such as a background save's, as an interpreter that ends does."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _exit_at_once(code: int) -> NoReturn:
    # An interpreter that ends as usual destroys its process groups. Their destructors may wait for ranks that are
    # elsewhere, and have ended the process by SIGABRT while another rank was still connected.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(sentence: str, error: Exception | None = None) -> None:
    sys.stdout.flush()
    print(f"fairseq_moe: error: {sentence}", file=sys.stderr)
    if error is not None:
        traceback.print_exception(error)
    sys.stderr.flush()
