"""The heartbeat without ranks: what its thread does when the run is over."""

import datetime
import json
import threading
from collections.abc import Sequence

import pytest
from torch.distributed import HashStore

from fairseq_moe.distributed import watchdog as module
from fairseq_moe.distributed.watchdog import Watchdog


class _SlowStore:
    """Answers late, as a store in another process may."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.has_answered = False

    def set(self, key: str, value: str) -> None:
        self.is_asked.set()
        threading.Event().wait(0.3)
        self.has_answered = True

    def check(self, keys: list[str]) -> bool:
        return False


def test_stop_waits_for_a_beat_that_is_on_its_way() -> None:
    # Else the interpreter may end while the thread is in the store's C++ code, and the rank dies of SIGABRT.
    store = _SlowStore()
    watchdog = Watchdog(store, rank=0, world_size=2, store_owner="rank 0")
    watchdog.start()
    assert store.is_asked.wait(30)
    watchdog.stop()
    assert store.has_answered
    assert all(thread.name != "heartbeat" for thread in threading.enumerate())


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll often: a rank is silent after 8 polls."""
    monkeypatch.setattr(module, "_BEAT_SEC", 0.02)


class _Scripted(HashStore):
    """Holds a new beat of other ranks from given polls on, the first of which is 0."""

    def __init__(self, polls: dict[int, Sequence[int]]) -> None:
        super().__init__()
        self._polls, self._number = polls, 0

    def check(self, keys: list[str]) -> bool:
        if len(keys) > 1:
            for rank, polls in self._polls.items():
                if self._number in polls:
                    beat = {"count": self._number + 1, "update": 1, "has_failed": False}
                    self.set(f"beat/{rank}", json.dumps(beat))
            self._number += 1
        return super().check(keys)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("polls", "sentence"),
    [
        # Rank 2 ends before it has beaten once, as a rank may in a first update that takes less than one beat.
        ({1: range(4, 99)}, "rank 2 lost"),
        ({1: [], 2: range(99)}, "rank 1 lost"),
        ({1: [0], 2: range(99)}, "rank 1 lost"),
        # It had sent its last beat before it was killed.
        *(({1: [0, late], 2: range(99)}, "rank 1 lost") for late in range(1, 7)),
        ({1: [0, 6], 2: [0, 3]}, "ranks 1, 2 lost"),
        ({1: range(0, 99, 5), 2: range(2, 99, 7)}, "ranks 1, 2 stuck"),  # on a machine with too much to do
        ({1: [0], 2: range(0, 99, 5)}, "rank 1 lost"),
    ],
)
def test_who_is_lost_and_who_is_stuck(polls: dict[int, Sequence[int]], sentence: str) -> None:
    watchdog = Watchdog(_Scripted(polls), rank=0, world_size=3, store_owner="rank 0")
    assert watchdog.explain(RuntimeError("gloo: connection closed")).sentence.startswith(sentence)


def test_the_first_beat_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_SEC", 60.0)
    store = HashStore()
    watchdog = Watchdog(store, rank=1, world_size=2, store_owner="rank 0")
    watchdog.start()
    store.wait(["beat/1"], datetime.timedelta(seconds=30))
    watchdog.stop()


class _SlowToSet(HashStore):
    """Takes its time to set what is sent first."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = threading.Event()

    def set(self, key: str, value: str) -> None:
        if not self.is_asked.is_set():
            self.is_asked.set()
            threading.Event().wait(0.3)
        super().set(key, value)


def test_an_older_beat_never_comes_after_a_newer_one() -> None:
    # Else a rank that asks for the verdict would be taken for one that is stuck.
    store = _SlowToSet()
    watchdog = Watchdog(store, rank=0, world_size=2, store_owner="rank 0")
    heart = threading.Thread(target=watchdog._beat)
    heart.start()
    assert store.is_asked.wait(30)
    watchdog._has_failed = True
    watchdog._beat()
    heart.join()
    assert json.loads(store.get("beat/0")) == {"count": 2, "update": 0, "has_failed": True}


_OF_RANK_2 = {"rank": 2, "sentence": "rank 2 failed", "has_cause": True, "silent": []}


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("is_read_before", [False, True], ids=["asks", "heart has read it"])
def test_rank_0_keeps_its_store_until_the_others_know(is_read_before: bool) -> None:
    # Else they would say that rank 0 is lost.
    store = HashStore()
    store.set("verdict", json.dumps(_OF_RANK_2))
    store.set("read/2", "")
    rank_0, rank_1 = (Watchdog(store, rank=r, world_size=3, store_owner="rank 0") for r in (0, 1))
    if is_read_before:
        rank_0._read_verdict()
    assert rank_0.explain(RuntimeError("gloo: connection closed")).sentence == "rank 2 failed"
    leaving = threading.Thread(target=rank_0.let_others_read)
    leaving.start()
    leaving.join(0.2)
    assert leaving.is_alive()
    rank_1._read_verdict()
    leaving.join(30)
    assert store.check(["read/1"])


@pytest.mark.usefixtures("soon")
def test_rank_0_does_not_wait_for_those_who_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STORE_POLLS", 10**9)
    watchdog = Watchdog(HashStore(), rank=0, world_size=3, store_owner="rank 0")
    assert watchdog.explain(RuntimeError("gloo: connection closed")).silent == [1, 2]
    watchdog.let_others_read()


class _Closing(HashStore):
    """Is gone as soon as the verdict is read."""

    is_read = False

    def set(self, key: str, value: str) -> None:
        self.is_read |= key.startswith("read/")
        super().set(key, value)

    def check(self, keys: list[str]) -> bool:
        if self.is_read:
            raise RuntimeError("Connection reset by peer")
        return super().check(keys)


def test_a_verdict_that_was_read_outlives_the_store() -> None:
    store = _Closing()
    store.set("verdict", json.dumps(_OF_RANK_2))
    watchdog = Watchdog(store, rank=1, world_size=3, store_owner="rank 0")
    watchdog._read_verdict()
    assert watchdog.explain(RuntimeError("gloo: connection closed")).sentence == "rank 2 failed"


@pytest.mark.usefixtures("soon")
def test_a_store_that_does_not_answer_is_gone() -> None:
    class Stuck(HashStore):
        def check(self, keys: list[str]) -> bool:
            threading.Event().wait(5)
            return False

    watchdog = Watchdog(Stuck(), rank=1, world_size=2, store_owner="rank 0")
    assert "rank 0 lost" in watchdog.explain(RuntimeError("gloo: connection closed")).sentence
