"""Memory that was freed is used again without new pages of the system. In forks: it is a setting of the process."""

import resource

import torch

from tests.helpers.ranks import run_ranks

MIB = 1024 * 1024
PAGES = 64 * MIB // 4096


def faults_of_second_use(rank: int, keep: bool) -> int:
    """Page faults of filling 64 MiB that were filled and freed before."""
    from fairseq_moe.optim.host_memory import keep_freed_memory

    if keep:
        assert keep_freed_memory()
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 * MIB, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_blocks_are_kept() -> None:
    [without], [kept] = run_ranks(faults_of_second_use, 1, False), run_ranks(faults_of_second_use, 1, True)
    assert kept < PAGES / 100
    assert without > 10 * kept + 100


def keeps_in_training(rank: int) -> bool:
    from fairseq_moe.stock import training
    from tests.helpers.tiny import build_trainer

    calls: list[int] = []
    training.keep_freed_memory = lambda: calls.append(1)  # type: ignore[assignment]
    build_trainer([])
    return calls == [1]


def test_training_on_a_cpu_asks_for_it() -> None:
    assert run_ranks(keeps_in_training, 1) == [True]
