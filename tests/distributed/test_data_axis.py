"""Ranks that share micro-batches under stock's trainer: what it takes for its data ranks, its seeds, and its files.

Run with ``pytest tests/distributed/test_data_axis.py``.
"""

import functools
from typing import Any

import pytest
import torch

from fairseq_moe.parallel.ranks import RankGrid
from tests.helpers.ranks import run_ranks

TENSOR = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
CONTEXT = ["--context-parallel-size", 2]
# Flags, ranks, and those that share each micro-batch.
LAYOUTS: dict[str, tuple[list[Any], int, list[list[int]]]] = {
    "T2": (TENSOR, 2, [[0, 1]]),
    "D2T2": (TENSOR, 4, [[0, 1], [2, 3]]),
    "D2C2": (CONTEXT, 4, [[0, 1], [2, 3]]),
    "C2T2": ([*TENSOR, *CONTEXT], 4, [[0, 1, 2, 3]]),
}


def sizes(trainer: Any) -> tuple[str, int]:
    """What a start logs of the whole model, and of what are no experts."""
    from fairseq_moe.models.sizes import whole_size
    from fairseq_moe.parallel.placement import is_expert
    from fairseq_moe.stock.find_experts import moe_decoder

    decoder = moe_decoder(trainer.get_model())
    assert decoder is not None
    dense = [p for p in trainer.get_model().parameters() if not is_expert(p)]
    return str(decoder.size), sum(whole_size(p, decoder.mesh) for p in dense)


def seen_by_stock(rank: int, flags: list[Any]) -> dict[str, Any]:
    import torch.distributed as dist

    from tests.helpers.tiny import build_trainer

    half = ["--fp16", "--fp16-no-flatten-grads", "--update-freq", 2]
    trainer = build_trainer([*flags, *half])
    group = trainer.data_parallel_process_group
    trainer._set_seed()
    return {
        "size": trainer.data_parallel_world_size,
        "rank": trainer.data_parallel_rank,
        "members": dist.get_process_group_ranks(group),
        "writes": (trainer.is_data_parallel_master, trainer.should_save_checkpoint_on_current_rank),
        "wraps": trainer.use_distributed_wrapper,
        "is_plain": trainer.model is trainer.get_model(),
        "drawn": torch.rand(1).item(),
        "scale_window": trainer.optimizer.scaler.scale_window,
        "sizes": sizes(trainer),
    }


def all_seen(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    return {
        name: seen_by_stock(rank, flags) for name, (flags, size, _) in LAYOUTS.items() if size == world_size
    }


@functools.cache
def found_on(world_size: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(all_seen, world_size, world_size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_stock_sees_the_data_axis_and_each_shard_draws_other_numbers(name: str) -> None:
    _, world_size, shards = LAYOUTS[name]
    for data_rank, sharing in enumerate(shards):
        for place, rank in enumerate(sharing):
            found = found_on(world_size)[rank][name]
            assert (found["size"], found["rank"]) == (len(shards), data_rank)
            assert found["members"] == [members[place] for members in shards]
            assert found["writes"] == (rank == 0, rank == 0)
            assert (found["wraps"], found["is_plain"]) == (False, True)
            assert found["scale_window"] == 2**14 // len(shards) // 2
            torch.manual_seed(3 + 1_000_003 * place)
            assert found["drawn"] == torch.rand(1).item()


def sizes_alone(rank: int) -> tuple[str, int]:
    from tests.helpers.tiny import build_trainer

    return sizes(build_trainer())


def test_sizes_are_those_of_one_process() -> None:
    (expected,) = run_ranks(sizes_alone, 1)
    for world_size in (2, 4):
        for found in found_on(world_size):
            assert {name: each["sizes"] for name, each in found.items()} == dict.fromkeys(found, expected)


def test_the_norm_needs_few_numbers_of_hundreds_of_ranks() -> None:
    from fairseq_moe.stock.step.gradients import GradNorm

    # What is held by the same ranks shares a slot: without tensor ranks, all that is no expert.
    assert GradNorm(RankGrid(data=4, expert=2))._copied_axes == [("data",), ("expert_replica",)]
    ranks = RankGrid(data=32, context=2, tensor=8, expert=64)
    axes = GradNorm(ranks)._copied_axes
    assert axes == [("data", "context", "tensor"), ("tensor",), ("data", "context"), ("expert_replica",)]
    assert 2 * sum(ranks.num_slots(each) for each in axes) == 2 * (1 + 64 + 8 + 64)


def read_other_words(rank: int, flags: list[Any], other_rank: int, part: str) -> str:
    """Do an update, and one in which one rank has another word in its second micro-batch."""
    from fairseq_moe.errors import RanksDisagreeError
    from tests.helpers.tiny import build_trainer, make_batch, update

    trainer = build_trainer([*flags, "--update-freq", 2])
    batches = [make_batch(10 * trainer.data_parallel_rank + micro) for micro in range(2)]
    assert update(trainer, batches)
    if rank == other_rank:
        words = batches[1]["target"] if part == "target" else batches[1]["net_input"]["src_tokens"]
        words[0, 3] += 1 if words[0, 3] < 30 else -1
    with pytest.raises(RanksDisagreeError) as caught:
        update(trainer, batches)
    return str(caught.value)


@pytest.mark.parametrize("part", ["words", "target"])
def test_ranks_that_share_a_micro_batch_and_read_other_words_stop_all_ranks(part: str) -> None:
    flags, world_size, _ = LAYOUTS["D2T2"]
    for sentence in run_ranks(read_other_words, world_size, flags, 3, part):
        assert sentence == (
            "ranks 2, 3 share their micro-batches, and have read different words in this update (rank 2 and rank 3 "
            "differ); give all ranks the same data, dictionary and flags."
        )


def test_a_checksum_is_of_words_and_their_places() -> None:
    from fairseq_moe.stock.step.words_read import _checksum

    words = torch.tensor([[5, 7, 9], [4, 3, 2]])
    others = [words.flip(0), words.flip(1), words.view(3, 2), words + 1, words[:, :2], words.view(1, 6)]
    assert len({int(_checksum(each)) for each in (words, *others)}) == 1 + len(others)


def test_what_is_compared_stays_exact_for_thousands_of_ranks() -> None:
    from fairseq_moe.parallel.ranks import RankGrid
    from fairseq_moe.stock.step.words_read import _PRIME, WordsRead

    read = WordsRead(RankGrid(data=1, context=64, tensor=64))
    read._checksum = _PRIME - 1
    own = read.values(0, torch.device("cpu"))
    read.judge((4096 * own).tolist())
    assert float(own[1] * 4096) < 2**53
