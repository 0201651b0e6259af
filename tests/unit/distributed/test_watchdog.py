"""The heartbeat without ranks: what its thread does when the run is over."""

import json
import threading

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


def test_a_rank_whose_first_beat_comes_late_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rank 2 ends before it has beaten once, as a rank may in a first update that takes less than one beat.
    monkeypatch.setattr(module, "_BEAT_SEC", 0.05)
    monkeypatch.setattr(module, "_SILENT_SEC", 0.4)
    store = HashStore()
    watchdog = Watchdog(store, rank=0, world_size=3, store_owner="rank 0")
    beat = json.dumps({"count": 1, "update": 1, "has_failed": False})
    threading.Timer(0.2, lambda: store.set("beat/1", beat)).start()
    verdict = watchdog.explain(RuntimeError("gloo: connection closed"))
    assert (verdict.rank, verdict.sentence[:11]) == (2, "rank 2 lost")
