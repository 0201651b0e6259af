"""R18: ranks may have batches of any shapes, and micro-batches of any; ranks that were started with different flags are
told so before they wait for each other.

Fifty random mixes of shapes in a layer: ``tests/distributed/test_uneven_batches.py``. Here, whole updates.
"""

import random
from typing import Any

import pytest

from fairseq_moe.flags.agreement import disagreements
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.updates import assert_equal

FLAGS = ["--moe-expert-count", 2, "--update-freq", 3, "--ddp-backend", "legacy_ddp"]  # two experts never drop
NUM_SEEDS = 8


def _batches(seed: int, rank: int, world_size: int) -> list[Any]:
    """Three micro-batches of random shapes, with padding in some."""
    from tests.helpers.tiny import make_batch

    shapes = random.Random(1000 * seed + rank)
    found = []
    for micro in range(3):
        length = shapes.randint(1, 15)
        found.append(
            make_batch(
                100 * seed + 10 * rank + micro,
                num_sequences=shapes.randint(1, 5),
                length=length,
                num_padded=shapes.choice([0, length // 2]),
            )
        )
    return found


def _report(trainer: Any, batches: list[Any]) -> dict[str, Any]:
    from tests.helpers.tiny import gradients, parameters, update

    return {
        "logged": update(trainer, batches),
        "gradients": gradients(trainer),
        "parameters": parameters(trainer),
    }


def _updates(rank: int, world_size: int, mutation: bool = False) -> list[dict[str, Any]]:
    from tests.helpers.tiny import build_trainer

    if mutation:
        from fairseq_moe.stock.step import gradients

        gradients._reduce_grads = lambda module, decoder: None
    found = []
    for seed in range(NUM_SEEDS):
        own = [_batches(seed, other, world_size) for other in range(world_size)]
        batches = own[rank] if not _is_alone(world_size) else [batch for one in own for batch in one]
        found.append(_report(build_trainer(FLAGS), batches))
    return found


def _is_alone(world_size: int) -> bool:
    from fairseq_moe import distributed

    return distributed.world_size() < world_size


def test_random_micro_batches_of_four_ranks_equal_one_process() -> None:
    [expected] = run_ranks(_updates, 1, 4, timeout=60)
    for found in run_ranks(_updates, 4, 4, timeout=60):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)


def test_this_test_sees_a_wrong_reduction() -> None:
    [expected] = run_ranks(_updates, 1, 2, timeout=60)
    found = run_ranks(_updates, 2, 2, True, timeout=60)[0]
    with pytest.raises(AssertionError):
        assert_equal(found[0], expected[0])


# --- ranks with other flags ---


def _build(rank: int, odd_flags: list[Any], mutation: bool = False) -> str:
    from fairseq import tasks

    from fairseq_moe.errors import ConfigError
    from fairseq_moe.models import moe_transformer_lm
    from tests.helpers import tiny

    if mutation:
        moe_transformer_lm._check_agreement = lambda args: None
    cfg = tiny._config(["--moe-expert-count", 12, *(odd_flags if rank == 1 else [])])
    task = tasks.setup_task(cfg.task)
    try:
        model = task.build_model(cfg.model)
    except ConfigError as error:
        return str(error)
    model(**tiny.make_batch(0)["net_input"])
    return "built"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--moe-freq", 1],
            "--moe-freq is 2 on ranks 0, 2 and 1 on rank 1; start all ranks with the same flags",
        ),
        (["--moe-expert-count", 6], "--moe-expert-count is 12 on ranks 0, 2 and 6 on rank 1"),
        (["--moe-top1-expert"], "--moe-top1-expert is False on ranks 0, 2 and True on rank 1"),
        (["--decoder-layers", 4], "--decoder-layers is 2 on ranks 0, 2 and 4 on rank 1"),
    ],
    ids=str,
)
def test_ranks_with_other_flags_all_say_so(flags: list[Any], said: str) -> None:
    for sentence in run_ranks(_build, 3, flags, timeout=20):
        assert said in sentence


def test_ranks_with_the_same_flags_start() -> None:
    assert run_ranks(_build, 3, [], timeout=20) == ["built"] * 3


def test_without_the_check_they_wait_for_each_other_or_fail_somewhere() -> None:
    with pytest.raises(RankError):
        run_ranks(_build, 3, ["--moe-freq", 1], True, timeout=5)


def test_every_difference_is_a_sentence() -> None:
    ranks = [{"a": "1", "b": "2"}] * 10 + [{"a": "1", "b": "3", "c": "None"}]
    assert [sentence.split(";")[0] for sentence in disagreements(ranks)] == [
        "--b is 2 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and more and 3 on rank 10",
        "--c is not there on ranks 0, 1, 2, 3, 4, 5, 6, 7 and more and None on rank 10",
    ]
    assert disagreements([{"a": "nan"}] * 2) == []
