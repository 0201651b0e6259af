"""Do several updates of tiny models on the ranks of a pipeline, and on one process: many cases in one start."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks

__all__ = ["EVEN", "P2", "P4", "SHAPES", "V2", "Case", "assert_same", "found_alone", "found_on_ranks"]

_ADAM = ("--optimizer", "adam", "--lr", 0.01, "--adam-eps", 1e-3)
P2 = ("--pipeline-model-parallel-size", 2)
P4 = ("--pipeline-model-parallel-size", 4)
V2 = ("--num-virtual-stages-per-pipeline-rank", 2)

# Micro-batches: seed, sequences, length, padding at the end of the last sequence. Of each update, of each data rank.
SHAPES = ((3, 1, 9, 0), (19, 2, 3, 1), (38, 3, 5, 2), (54, 1, 13, 0))
# Four shapes in one update; one micro-batch, fewer than stages; three, which interleaved stages fill up, as an epoch's
# last update may be.
EVEN: tuple[tuple[tuple[Any, ...], ...], ...] = ((SHAPES,), (SHAPES[2:3],), (SHAPES[1:],))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describe updates on ranks.

    Args:
        name: of the case.
        model: flags of the reference as well.
        layout: flags of the ranks alone.
        ranks: how many.
        updates: micro-batches of each update, of each data rank; None is a rank without data.
        dtype: of the model.
        bound: of differences of parameters, relative to their norm.
        of_logs: bound of relative differences of logged numbers.
        numbers: the logged ones that are compared, without the loads of experts; none: all.
        is_tied: the words of input and output are the same tensor.
        is_post_norm: norms stand after blocks, which hydra's users can ask for, and no --arch.
    """

    name: str
    model: tuple[Any, ...]
    layout: tuple[Any, ...] = P2
    ranks: int = 2
    updates: tuple[tuple[tuple[Any, ...], ...], ...] = EVEN
    dtype: torch.dtype = torch.float64
    bound: float = 1e-6
    numbers: tuple[str, ...] = ()
    is_tied: bool = True
    is_post_norm: bool = False
    of_logs: float = 2e-6


def found_on_ranks(
    cases: Sequence[Case], folder: Any, prepare: Callable[[], None] | None = None
) -> dict[str, list[Any]]:
    """Run cases of one number of ranks; returns what each rank found, by the case's name."""
    by_rank = run_ranks(_all, cases[0].ranks, list(cases), str(folder), prepare, timeout=60 + 20 * len(cases))
    return {case.name: [found[case.name] for found in by_rank] for case in cases}


def found_alone(cases: Sequence[Case], folder: Any) -> dict[str, Any]:
    """Run cases on one process, which takes the micro-batches of all data ranks."""
    found: dict[str, Any] = run_ranks(_all, 1, list(cases), str(folder), None, timeout=60 + 20 * len(cases))[
        0
    ]
    return found


def _all(rank: int, cases: list[Case], folder: str, prepare: Callable[[], None] | None) -> dict[str, Any]:
    if prepare is not None:
        prepare()
    return {case.name: _run(case, os.path.join(folder, case.name.replace(" ", "-"))) for case in cases}


def _run(case: Case, folder: str) -> dict[str, Any]:

    from fairseq_moe.distributed import rank, world_size
    from tests.helpers.tiny import gradients, parameters

    is_alone = world_size() == 1
    folder += "-alone" if is_alone else ""
    os.makedirs(folder, exist_ok=True)
    layout = () if is_alone else case.layout
    flags = [*_ADAM, *case.model, *layout, "--save-dir", folder, "--log-interval", 1]
    trainer = _trainer(case, flags)
    trainer.reset_dummy_batch(_batch((3, 1, 9, 0)))
    logged, grads = [], {}
    for index, by_data_rank in enumerate(case.updates):
        if is_alone:
            samples = [_batch(each) for own in by_data_rank for each in own if each is not None]
        else:
            samples = [_batch(each) for each in by_data_rank[trainer.data_parallel_rank]]
        logged.append(_update(trainer, samples))
        if index == 0 and logged[-1]:
            grads = gradients(trainer)
    valid = _validate(trainer)
    values = parameters(trainer)  # compares copies, bit by bit
    path = os.path.join(folder, "moe_load.jsonl")
    loads = []
    if rank() == 0 and os.path.exists(path):
        with open(path) as lines:
            loads = [json.loads(line) for line in lines]
    scale = getattr(getattr(trainer.optimizer, "scaler", None), "loss_scale", None)
    return {
        "logged": logged,
        "valid": valid,
        "loads": loads,
        "scale": scale,
        "gradients": grads if rank() == 0 else {},
        "parameters": values if rank() == 0 else {},
        "updates": trainer.get_num_updates(),
    }


def _trainer(case: Case, flags: list[Any]) -> Any:
    import tests.helpers.tiny as tiny

    all_flags, make, tie = tiny.TINY_FLAGS, tiny._config, "--share-decoder-input-output-embed"

    def config(flags: Sequence[Any]) -> Any:
        cfg = make(flags)
        cfg.model.decoder_normalize_before = not case.is_post_norm
        return cfg

    tiny.TINY_FLAGS = [flag for flag in all_flags if case.is_tied or flag != tie]
    tiny._config = config
    try:
        return tiny.build_trainer(flags, dtype=case.dtype)
    finally:
        tiny.TINY_FLAGS, tiny._config = all_flags, make


def _update(trainer: Any, samples: list[Any]) -> dict[str, float]:
    """Do one update as fairseq-train does; {} where it was skipped."""
    from fairseq.logging import metrics

    metrics.reset()
    with metrics.aggregate("train_inner"):
        if trainer.train_step(samples) is None:
            return {}
    meters = metrics.get_meters("train")
    return {name: float(meter.avg) for name, meter in meters.items() if hasattr(meter, "avg")} | {
        "sample_size": float(meters["loss"].count)
    }


def _validate(trainer: Any) -> dict[str, float]:
    """Validate one batch, the same on every data rank."""
    from fairseq.logging import metrics

    metrics.reset()
    with metrics.aggregate("valid", new_root=False):
        trainer.valid_step(_batch((7, 2, 11, 2)))
    return {
        name: float(meter.avg)
        for name, meter in metrics.get_meters("valid").items()
        if hasattr(meter, "avg") and name not in ("wpb", "bsz")  # each data rank validates it
    }


def _batch(spec: Any) -> Any:
    from tests.helpers.tiny import make_batch

    if spec is None:
        return None
    seed, num_sequences, length, padded = spec
    return make_batch(seed, num_sequences=num_sequences, length=length, num_padded=padded)


def assert_same(case: Case, by_rank: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Compare what every rank logged, and what rank 0 gathered, with one process's."""
    for rank, found in enumerate(by_rank):
        where = f"{case.name}, rank {rank}"
        for number, (own, theirs) in enumerate(zip(found["logged"], expected["logged"], strict=True)):
            _assert_numbers(own, theirs, case, f"{where}, update {number}")
        _assert_numbers(found["valid"], expected["valid"], case, f"{where}, validation")
        assert found["updates"] == expected["updates"], where
        assert found["scale"] == expected["scale"], where
    for kind in ("gradients", "parameters"):
        _assert_close(by_rank[0][kind], expected[kind], case.bound, f"{case.name}: {kind}")
    assert expected["loads"], case.name
    assert case.numbers or by_rank[0]["loads"] == expected["loads"], case.name


_OF_TIME = ("ups", "wps", "wall", "train_wall")


def _assert_numbers(found: dict[str, float], expected: dict[str, float], case: Case, where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        if "time" in name or name in _OF_TIME or (case.numbers and name not in case.numbers):
            continue
        assert found[name] == pytest.approx(value, rel=case.of_logs, abs=1e-12), f"{where}: {name}"


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float, where: str) -> None:
    """Each difference is within ``bound`` of the tensor's norm, or a thousandth of that of the norm of all."""
    assert sorted(found) == sorted(expected), where
    assert expected, where
    total = math.sqrt(sum(float(tensor.double().norm()) ** 2 for tensor in expected.values()))
    for name, tensor in expected.items():
        difference = float((found[name].double() - tensor.double()).norm())
        scale = max(float(tensor.double().norm()), 1e-3 * total)
        assert difference <= bound * scale, f"{where}: {name} differs by {difference / scale:.2g}"
