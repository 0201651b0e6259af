"""Which rank is to blame when a collective fails: heartbeats and last words in the store that all ranks share.

A collective that fails says which connection broke, not which rank, and not why. So each rank has a thread
that writes a growing count and its update into the store. A rank that fails writes why, before it ends. A
rank whose collective has failed looks there, and all agree on one verdict: the first that was written.
Nothing here is a collective, and nothing waits for another rank without a deadline.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["PEER_LOST_EXIT_CODE", "Verdict", "Watchdog", "is_collective_failure"]

PEER_LOST_EXIT_CODE = 3

_BEAT_SEC = 0.5
_SILENT_SEC = 4.0  # a rank that has not beaten for so long is gone or stopped
_STORE_SEC = 6.0  # a store that has not answered for so long is gone or stopped
_END_BY_ITSELF_SEC = 5.0  # what a rank gets to meet the failure by itself once the verdict is there
_VERDICT = "verdict"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Names the rank that ended the run, and why.

    Args:
        rank: who is to blame.
        sentence: for all logs.
        has_cause: whether that rank has said why, so that where the others stand is of no interest.
    """

    rank: int
    sentence: str
    has_cause: bool = False


@dataclass(frozen=True, kw_only=True)
class _Beat:
    count: int
    update: int
    has_failed: bool  # it asks for the verdict itself


class Watchdog:
    """Keeps this rank's heartbeat, and looks for those of the others.

    Args:
        store: shared by all ranks.
        rank: this process.
        world_size: number of ranks.
        store_owner: who is gone when the store is.
    """

    def __init__(self, store: Any, *, rank: int, world_size: int, store_owner: str) -> None:
        self.update = 0  # the update that this rank is working on, from 1
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._store_owner = store_owner
        self._count = 0
        self._has_failed = False
        self._verdict: Verdict | None = None
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def of_this_process(cls) -> "Watchdog | None":
        """Start a watchdog for the current process group; None where torch has no store to share."""
        if not hasattr(distributed_c10d, "_get_default_store"):
            return None
        default: Any = distributed_c10d._get_default_store()
        store = default.clone()  # a connection of its own: the other one may be busy
        of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        watchdog = cls(
            distributed_c10d.PrefixStore("fairseq_moe", store),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            store_owner="the launcher" if of_launcher else "rank 0",
        )
        watchdog.start()
        return watchdog

    def start(self) -> None:
        """Write heartbeats, in a thread of its own, until ``stop``."""
        self._heart.start()

    @property
    def where(self) -> str:
        """Place in training at which this rank is, in words."""
        return f"at update {self.update}" if self.update else "before the first update"

    def stop(self) -> None:
        """End the heartbeat, because the run is over, and wait for it.

        An interpreter that ends while the thread is in the store's C++ code ends it there, and with it the process: by
        SIGABRT.
        """
        self._stopped.set()
        self._heart.join(_STORE_SEC)

    def accuse_self(self, reason: str) -> Verdict:
        """Tell the others why this rank ends, unless they know of something earlier.

        Returns:
            what they are told.
        """
        self._has_failed = True
        sentence = f"rank {self._rank} failed {self.where}: {reason}"
        own = Verdict(rank=self._rank, sentence=sentence, has_cause=True)
        verdict = _within(_STORE_SEC, lambda: self._post(own)) or own
        self._let_others_read()
        return verdict

    def explain(self, error: BaseException) -> Verdict:
        """Find out why a collective has failed; the same verdict on every rank that asks.

        Args:
            error: what the collective raised here.
        """
        self._has_failed = True
        if self._verdict is not None:
            return self._verdict
        found = _within(_SILENT_SEC + _STORE_SEC, lambda: self._post(self._investigate(error)))
        if found is None:
            return self._store_is_gone()
        self._let_others_read()
        return found

    def _store_is_gone(self) -> Verdict:
        sentence = f"{self._store_owner} lost {self.where}: the store that it kept does not answer"
        return Verdict(rank=0, sentence=sentence)

    def _let_others_read(self) -> None:
        if self._rank == 0 and self._store_owner == "rank 0":
            time.sleep(4 * _BEAT_SEC)  # the store ends with this process

    def _investigate(self, error: BaseException) -> Verdict:
        self._beat()
        first, started = self._beats(), time.monotonic()
        while time.monotonic() - started < _SILENT_SEC:
            verdict = self._read_verdict()
            if verdict is not None:
                return verdict
            time.sleep(_BEAT_SEC)
        now = self._beats()
        waiting = {r: beat for r, beat in now.items() if not beat.has_failed}
        has_stopped = {r for r in waiting if r in first and waiting[r].count == first[r].count}
        silent = [r for r in range(self._world_size) if r in has_stopped or r not in now]
        if silent:
            return self._blame(silent, now, "lost", f"no sign of life for {_SILENT_SEC:g} s")
        if waiting:
            return self._blame(
                list(waiting), now, "stuck", "alive, but not where the other ranks have waited for it"
            )
        first_line = str(error).strip().split("\n")[0]
        return Verdict(
            rank=self._rank,
            sentence=f"all ranks are alive, and a collective failed {self.where}: {first_line}",
        )

    def _blame(self, ranks: list[int], beats: dict[int, _Beat], how: str, sign: str) -> Verdict:
        # Its last beat may be older than its last update; but this rank would not have come so far without it.
        update = max(self.update, beats[ranks[0]].update if ranks[0] in beats else 0)
        where = f"at update {update}" if update else "before the first update"
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        return Verdict(rank=ranks[0], sentence=f"{who} {how} {where} ({sign})")

    def _run(self) -> None:
        verdict = None
        try:
            while verdict is None and not self._stopped.wait(_BEAT_SEC):
                self._beat()
                verdict = self._read_verdict()
        except (RuntimeError, OSError):
            verdict = self._store_is_gone()
        self._verdict = verdict
        if verdict is not None and not self._stopped.wait(_END_BY_ITSELF_SEC) and not self._has_failed:
            print(f"fairseq_moe: error: {verdict.sentence}; stacks of rank {self._rank}:", file=sys.stderr)
            faulthandler.dump_traceback(file=sys.stderr)
            os._exit(PEER_LOST_EXIT_CODE)

    def _beat(self) -> None:
        self._count += 1
        beat = _Beat(count=self._count, update=self.update, has_failed=self._has_failed)
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _beats(self) -> dict[int, _Beat]:
        keys = [f"beat/{r}" for r in range(self._world_size)]
        here = list(range(self._world_size))
        if not self._store.check(keys):
            here = [r for r in here if self._store.check([keys[r]])]
        values = self._store.multi_get([keys[r] for r in here])
        return {r: _Beat(**json.loads(value)) for r, value in zip(here, values, strict=True)}

    def _read_verdict(self) -> Verdict | None:
        if not self._store.check([_VERDICT]):
            return None
        return Verdict(**json.loads(self._store.get(_VERDICT)))

    def _post(self, verdict: Verdict) -> Verdict:
        """Write ``verdict`` unless there is one, and return the one that counts."""
        return Verdict(**json.loads(self._store.compare_set(_VERDICT, "", json.dumps(asdict(verdict)))))


def _within(seconds: float, ask: Callable[[], Verdict]) -> Verdict | None:
    """Wait for the answer of ``ask``; None when it fails or takes longer."""
    answers: list[Verdict] = []

    def run() -> None:
        try:
            answers.append(ask())
        except (RuntimeError, OSError):
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def is_collective_failure(error: BaseException) -> bool:
    """Tell whether ``error`` says that other ranks could not be reached, rather than what is wrong here."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    )
