"""Do one update of a tiny MoE model on any number of ranks, and the same on one process, to compare them.

W ranks must equal one process that takes the ranks' batches as the micro-batches of ``--update-freq W``.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks

__all__ = ["BATCHES", "alone", "assert_all_equal", "assert_equal", "on_ranks"]

# (seed, sequences, length) of one micro-batch after the other. Capacity depends on the micro-batch: nothing
# may be dropped: four experts drop nothing of these (found by trying, and checked), two never do.
BATCHES = [(3, 1, 9), (19, 2, 3), (38, 3, 3), (54, 1, 5), (19, 1, 13), (38, 1, 6), (54, 2, 5), (3, 1, 10)]


def _micro_batches(world_size: int, flags: list[Any], *, even: bool) -> list[list[Any]]:
    """Make the micro-batches of each rank, of different sizes and lengths, or of one size if ``even``."""
    from tests.helpers.tiny import make_batch

    update_freq = int(flags[flags.index("--update-freq") + 1]) if "--update-freq" in flags else 1

    def batch(index: int) -> Any:
        seed, num_sequences, length = BATCHES[index]
        if even:
            seed, num_sequences, length = index, 2, 8
        return make_batch(seed, num_sequences=num_sequences, length=length)

    return [[batch(rank + world_size * micro) for micro in range(update_freq)] for rank in range(world_size)]


def _joined(micro_batches: list[Any]) -> Any:
    """Join batches of one length into one large batch."""
    names = ("src_tokens", "src_lengths")
    inputs = {name: torch.cat([batch["net_input"][name] for batch in micro_batches]) for name in names}
    target = torch.cat([batch["target"] for batch in micro_batches])
    size = len(target)
    ntokens = sum(batch["ntokens"] for batch in micro_batches)
    counts = {"id": torch.arange(size), "nsentences": size, "ntokens": ntokens}
    return {**counts, "net_input": inputs, "target": target}


def _report(flags: list[Any], micro_batches: list[Any], dtype: torch.dtype) -> dict[str, Any]:
    from tests.helpers.tiny import build_trainer, gradients, parameters, update

    trainer = build_trainer(flags, dtype=dtype)
    logged = update(trainer, micro_batches)
    return {"logged": logged, "gradients": gradients(trainer), "parameters": parameters(trainer)}


def _update_on_rank(
    rank: int,
    flags: list[Any],
    world_size: int,
    *,
    even: bool = False,
    dtype: torch.dtype = torch.float32,
    mutation: str | None = None,
) -> dict[str, Any]:
    if mutation is not None:
        MUTATIONS[mutation]()
    return _report(flags, _micro_batches(world_size, flags, even=even)[rank], dtype)


def _update_alone(
    rank: int, flags: list[Any], world_size: int, *, even: bool, joined: bool, dtype: torch.dtype
) -> dict[str, Any]:
    by_rank = _micro_batches(world_size, flags, even=even)
    batches = [batch for own in by_rank for batch in own]
    return _report(flags, [_joined(batches)] if joined else batches, dtype)


def on_ranks(flags: tuple[Any, ...], world_size: int, **options: Any) -> list[dict[str, Any]]:
    """Do one update on all ranks; returns each one's logged numbers, gradients and parameters.

    Args:
        flags: in addition to those of ``tests.helpers.tiny``.
        world_size: number of ranks.
        options: ``even`` (batches of one size), ``dtype``, ``mutation`` (a key of ``MUTATIONS``).
    """
    return run_ranks(functools.partial(_update_on_rank, **options), world_size, list(flags), world_size)


@functools.cache
def alone(
    flags: tuple[Any, ...],
    world_size: int,
    *,
    even: bool = False,
    joined: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Do the update on one process, which takes the ranks' batches as micro-batches; computed once for these arguments.

    Args:
        flags: as those of the ranks, without what concerns ranks alone.
        world_size: number of ranks whose batches it takes.
        even: batches of one size.
        joined: as one large batch instead.
        dtype: of the model.
    """
    body = functools.partial(_update_alone, even=even, joined=joined, dtype=dtype)
    result: dict[str, Any] = run_ranks(body, 1, list(flags), world_size)[0]
    return result


def assert_equal(
    found: dict[str, Any],
    expected: dict[str, Any],
    *,
    relative: float = 3e-6,
    of_norm: float = 1e-6,
    drops: bool = False,
) -> None:
    """Compare two updates; differences may be ``relative`` of a tensor's norm plus ``of_norm`` of the global norm."""
    assert (found["logged"]["drop_rate"] > 0) is drops
    gnorm = expected["logged"]["gnorm"]
    for name, value in expected["logged"].items():
        if "time" not in name and name not in ("ups", "wps", "wall", "train_wall"):
            assert found["logged"][name] == pytest.approx(value, rel=2e-6), name
    for kind in ("gradients", "parameters"):
        assert found[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            difference = _norm(found[kind][name] - tensor)
            assert difference <= relative * _norm(tensor) + of_norm * gnorm, (kind, name, difference)


def assert_all_equal(by_rank: list[dict[str, Any]], expected: dict[str, Any], **bounds: float) -> None:
    """Compare every rank's update with the expected one; bounds as those of ``assert_equal``."""
    assert by_rank
    for found in by_rank:
        assert_equal(found, expected, **bounds)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _no_division() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    gradients._reduce_grads = lambda module, decoder: None


def _no_sum_over_replicas() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    stock_sum = gradients.all_reduce_sum
    gradients.all_reduce_sum = lambda tensor, group=None: tensor if group is not None else stock_sum(tensor)


def _experts_left_out_of_the_norm() -> None:
    import fairseq_moe.stock.step.gradients as gradients
    from fairseq_moe.parallel.placement import is_expert

    total = gradients.GradNorm._total
    gradients.GradNorm._total = lambda self, params, device: total(
        self, [p for p in params if not is_expert(p)], device
    )


MUTATIONS: dict[str, Callable[[], None]] = {
    "no division": _no_division,
    "no sum over replicas": _no_sum_over_replicas,
    "experts left out of the norm": _experts_left_out_of_the_norm,
}
