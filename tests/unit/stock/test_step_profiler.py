"""Which updates a profiler starts before and stops after, with a tool that only writes down what it is asked."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tests.helpers.ranks import run_ranks


class _Notes:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    def start(self) -> None:
        self.asked.append("start")

    def marked(self, name: str) -> AbstractContextManager[Any]:
        self.asked.append(name)
        return nullcontext()

    def stop(self, updates: range) -> None:
        self.asked.append(list(updates))


def _asked(updates: range, done: list[int]) -> list[Any]:
    """Make updates of which ``done`` says how many are done after each; returns what the tool was asked, to the end."""
    from fairseq_moe.stock.step.profiling import StepProfiler

    notes, before = _Notes(), done[0]
    profiler = StepProfiler(updates, notes)
    for after in done[1:]:
        with profiler.around(before + 1):
            pass
        profiler.after(after)
        before = after
    notes.asked.append("end")
    profiler.finish()
    return notes.asked


def _cases(rank: int) -> list[Any]:
    return [
        _asked(range(2, 4), [0, 1, 2, 3, 4, 5]),
        _asked(range(1, 2), [0, 1, 2]),
        _asked(range(2, 5), [2, 3, 4]),  # goes on inside, with update 3
        _asked(range(2, 4), [0, 1, 1, 2, 2, 3, 4]),  # the second and fourth are skipped, and tried again
        _asked(range(2, 9), [0, 1, 2, 3]),  # ends inside
        _asked(range(2, 4), [7, 8, 9]),  # goes on behind
    ]


def test_window() -> None:
    [found] = run_ranks(_cases, 1)
    assert found == [
        ["start", "update 2", "update 3", [2, 3], "end"],
        ["start", "update 1", [1], "end"],
        ["start", "update 3", "update 4", [3, 4], "end"],
        ["start", "update 2", "update 2", "update 3", "update 3", [2, 3], "end"],
        ["start", "update 2", "update 3", "end", [2, 3]],
        ["end"],
    ]


def _said_of_a_failed_gpu(rank: int) -> list[str]:
    """Close the range of updates 2 and 3 on a GPU that answers with an error only."""
    from fairseq_moe.stock.step import profiling

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    profiling.logger.addHandler(handler)
    torch.cuda.synchronize = fail  # type: ignore[assignment]
    profiling.NsysTool().stop(range(2, 4))
    return said


def test_a_failed_gpu_is_no_second_error() -> None:
    [[sentence]] = run_ranks(_said_of_a_failed_gpu, 1)
    assert sentence.startswith("the range of updates 2 to 3 on rank 0 was not closed for nsys (CUDA error: ")
