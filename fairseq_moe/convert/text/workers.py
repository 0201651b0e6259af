"""Do pieces of work in forked processes; one that dies, and an error in one, end all with a sentence."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar

from fairseq_moe.errors import MoEError

__all__ = ["Workers"]

T = TypeVar("T")


class Workers(Generic[T]):
    """Run ``work`` on many pieces, each in one of several processes. To be used in a ``with``, which starts them.

    They are forked, because a new interpreter takes seconds to import torch and fairseq; so no thread may hold a lock
    when they start. One that has lost its parent ends by itself, when its piece is done.

    Args:
        count: of processes.
        work: does a piece; raises MoEError.
    """

    def __init__(self, count: int, work: Callable[[T], None]) -> None:
        self._count = count
        self._work = work
        self._processes: dict[Connection, ForkProcess] = {}

    def __enter__(self) -> "Workers[T]":
        context = multiprocessing.get_context("fork")
        for _ in range(self._count):
            ours, its = context.Pipe()
            # A daemon: an error or a signal between two starts must leave none that the interpreter waits for.
            process = context.Process(
                target=_serve, args=(its, [*self._processes, ours], self._work), daemon=True
            )
            self._processes[ours] = process
            process.start()
            its.close()
        return self

    def __exit__(self, *error: object) -> None:
        for connection, process in self._processes.items():
            process.kill()  # what it is writing has a temporary name
            process.join()
            connection.close()

    def run(self, pieces: Sequence[T]) -> Iterator[T]:
        """Yield each piece when it is done, in any order.

        Raises:
            MoEError: of ``work``; or a process has died.
        """
        waiting, busy = deque(pieces), dict[Connection, T]()

        def give(connection: Connection) -> None:
            if waiting:
                busy[connection] = waiting.popleft()
                connection.send(busy[connection])

        for connection in self._processes:
            give(connection)
        while busy:
            ready = wait(list(busy))
            for connection in [connection for connection in busy if connection in ready]:
                piece = busy.pop(connection)
                self._receive(connection, piece)
                give(connection)
                yield piece

    def _receive(self, connection: Connection, piece: T) -> None:
        try:
            problem: str | None = connection.recv()
        except (EOFError, ConnectionError) as error:
            process = self._processes[connection]
            process.join()
            code = process.exitcode or 0
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            raise MoEError(
                f"a worker {how} at {piece}; if that was for memory, give fewer --workers"
            ) from error
        if problem is not None:
            raise MoEError(problem)


def _serve(connection: Connection, others: list[Connection], work: Callable[[T], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends its workers
    for other in others:
        other.close()  # a worker that holds these would not let the others see that the parent is gone
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core for each worker
    while True:
        try:
            piece = connection.recv()
            try:
                work(piece)
                problem = None
            except MoEError as error:
                problem = str(error)
            connection.send(problem)
        except (EOFError, ConnectionError):
            return
