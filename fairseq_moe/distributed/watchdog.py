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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["PEER_LOST_EXIT_CODE", "Verdict", "Watchdog", "is_collective_failure"]

PEER_LOST_EXIT_CODE = 3

_BEAT_SEC = 0.5
# Polls are as far apart as beats. They are counted, for while this process does not run, others may not run either.
_SILENT_POLLS = 8  # a rank that has not beaten for so many is gone or stopped
_ALIVE_POLLS = 2  # one that has beaten within these is neither; in between, it is too early to say
_STORE_POLLS = 12  # a store that has not answered for so many is gone or stopped
_END_BY_ITSELF_SEC = 5.0  # what a rank gets to meet the failure by itself once the verdict is there
_VERDICT = "verdict"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Names the rank that ended the run, and why.

    Args:
        rank: who is to blame.
        sentence: for all logs.
        has_cause: whether that rank has said why, so that where the others stand is of no interest.
        silent: ranks that will read nothing any more.
    """

    rank: int
    sentence: str
    has_cause: bool = False
    silent: Sequence[int] = ()


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
        self._num_answers = 0  # of the store
        self._beating = threading.Lock()  # else an older beat could come after a newer one
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
        self._heart.join(_STORE_POLLS * _BEAT_SEC)

    def accuse_self(self, reason: str) -> Verdict:
        """Tell the others why this rank ends, unless they know of something earlier.

        Returns:
            what they are told.
        """
        self._has_failed = True
        sentence = f"rank {self._rank} failed {self.where}: {reason}"
        own = Verdict(rank=self._rank, sentence=sentence, has_cause=True)
        return self._ask(lambda: self._post(own)) or own

    def explain(self, error: BaseException) -> Verdict:
        """Find out why a collective has failed; the same verdict on every rank that asks.

        Args:
            error: what the collective raised here.
        """
        self._has_failed = True
        found = self._ask(lambda: self._post(self._investigate(error)))
        return found or self._verdict or self._store_is_gone()

    def let_others_read(self) -> None:
        """Wait, before this process ends and the store with it, until all ranks that live know the verdict."""
        verdict = self._verdict
        if verdict is None or self._rank != 0 or self._store_owner != "rank 0":
            return
        others = [f"read/{r}" for r in range(self._world_size) if r not in verdict.silent]
        for _ in range(_STORE_POLLS):
            if self._store.check(others):
                return
            time.sleep(_BEAT_SEC)

    def _store_is_gone(self) -> Verdict:
        sentence = f"{self._store_owner} lost {self.where}: the store that it kept does not answer"
        return Verdict(rank=0, sentence=sentence)

    def _investigate(self, error: BaseException) -> Verdict:
        self._beat()
        quiet = _QuietPolls(self._world_size)
        for number in range(2 * _SILENT_POLLS):
            verdict = self._read_verdict()
            if verdict is not None:
                return verdict
            beats = self._beats()
            quiet.see(beats)
            if number >= _SILENT_POLLS and quiet.is_clear():
                break
            time.sleep(_BEAT_SEC)
        if quiet.silent():
            return self._blame(
                quiet.silent(), beats, "lost", f"no sign of life for {_SILENT_POLLS * _BEAT_SEC:g} s"
            )
        if quiet.num_polls:
            return self._blame(
                list(quiet.num_polls),
                beats,
                "stuck",
                "alive, but not where the other ranks have waited for it",
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
        silent = ranks if how == "lost" else []
        return Verdict(rank=ranks[0], sentence=f"{who} {how} {where} ({sign})", silent=silent)

    def _run(self) -> None:
        verdict = None
        try:
            while verdict is None:
                self._beat()  # at once: a rank that ends soon has then been seen
                verdict = self._read_verdict()
                if verdict is None and self._stopped.wait(_BEAT_SEC):
                    return
        except (RuntimeError, OSError):
            verdict = self._verdict = self._verdict or self._store_is_gone()
        if not self._stopped.wait(_END_BY_ITSELF_SEC) and not self._has_failed:
            print(f"fairseq_moe: error: {verdict.sentence}; stacks of rank {self._rank}:", file=sys.stderr)
            faulthandler.dump_traceback(file=sys.stderr)
            os._exit(PEER_LOST_EXIT_CODE)

    def _beat(self) -> None:
        with self._beating:
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
        is_there = self._store.check([_VERDICT])
        self._num_answers += 1
        return self._note(self._store.get(_VERDICT)) if is_there else None

    def _post(self, verdict: Verdict) -> Verdict:
        """Write ``verdict`` unless there is one, and return the one that counts."""
        return self._note(self._store.compare_set(_VERDICT, "", json.dumps(asdict(verdict))))

    def _note(self, text: bytes) -> Verdict:
        """Keep the verdict before rank 0, which may then end with the store, is told that it is known here."""
        self._verdict = verdict = Verdict(**json.loads(text))
        self._store.set(f"read/{self._rank}", "")
        return verdict

    def _ask(self, question: Callable[[], Verdict]) -> Verdict | None:
        """Wait for an answer; None when the store fails, or has not answered anything for too long."""
        answers: list[Verdict] = []

        def run() -> None:
            try:
                answers.append(question())
            except (RuntimeError, OSError):
                return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        num_answers, num_waits = self._num_answers, 0
        while thread.is_alive() and num_waits < _STORE_POLLS:
            thread.join(_BEAT_SEC)
            num_waits = num_waits + 1 if num_answers == self._num_answers else 0
            num_answers = self._num_answers
        return answers[0] if answers else None


class _QuietPolls:
    """Count, for each rank that has not failed itself, at how many polls in a row it had not beaten anew.

    Two of them would not do: the last beat of a rank that is gone may arrive after the first.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.num_polls = dict.fromkeys(range(world_size), -1)
        self._counts = dict.fromkeys(range(world_size), 0)  # of one that has not beaten yet

    def see(self, beats: dict[int, _Beat]) -> None:
        """Take up what one poll has found; a rank that has failed is of no further interest."""
        for r, beat in beats.items():
            if beat.has_failed:
                self.num_polls.pop(r, None)
            elif beat.count != self._counts[r]:
                self._counts[r], self.num_polls[r] = beat.count, -1
        for r in self.num_polls:
            self.num_polls[r] += 1

    def silent(self) -> list[int]:
        """List the ranks that are gone or stopped."""
        return [r for r, number in self.num_polls.items() if number >= _SILENT_POLLS]

    def is_clear(self) -> bool:
        """Tell whether every rank has either beaten just now or been silent for long enough."""
        return all(number < _ALIVE_POLLS or number >= _SILENT_POLLS for number in self.num_polls.values())


def is_collective_failure(error: BaseException) -> bool:
    """Tell whether ``error`` says that other ranks could not be reached, rather than what is wrong here."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    )
