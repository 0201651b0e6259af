"""The same update on 1, 2 and 4 ranks: losses, norm, every gradient and the step.

Run with ``pytest tests/distributed/test_training_equality.py``.

W ranks must equal one process that takes the ranks' batches as the micro-batches of ``--update-freq W``; and,
without the balance loss (a product of means, so it depends on the micro-batch), one large batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks

BACKENDS = ["legacy_ddp", "pytorch_ddp", "fully_sharded"]
LAYOUTS = [  # (world size, experts, further flags)
    pytest.param(2, 4, (), id="2-ranks-4-experts"),
    pytest.param(4, 4, (), id="4-ranks-4-experts"),
    pytest.param(4, 2, (), id="4-ranks-2-experts-each-twice"),
    pytest.param(2, 1, ("--moe-top1-expert",), id="2-ranks-1-expert-held-twice"),
]
# (seed, sequences, length) of one micro-batch after the other. Capacity depends on the micro-batch: nothing
# may be dropped: four experts drop nothing of these (found by trying, and checked), two never do.
BATCHES = [(3, 1, 9), (19, 2, 3), (38, 3, 3), (54, 1, 5), (19, 1, 13), (38, 1, 6), (54, 2, 5), (3, 1, 10)]


def _micro_batches(world_size: int, flags: list[Any], *, even: bool) -> list[list[Any]]:
    """The micro-batches of each rank, of different sizes and lengths, or of one size if ``even``."""
    from tests.helpers.tiny import make_batch

    update_freq = int(flags[flags.index("--update-freq") + 1]) if "--update-freq" in flags else 1

    def batch(index: int) -> Any:
        seed, num_sequences, length = BATCHES[index]
        if even:
            seed, num_sequences, length = index, 2, 8
        return make_batch(seed, num_sequences=num_sequences, length=length)

    return [[batch(rank + world_size * micro) for micro in range(update_freq)] for rank in range(world_size)]


def _joined(micro_batches: list[Any]) -> Any:
    """One large batch of batches of one length."""
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


def _on_ranks(flags: tuple[Any, ...], world_size: int, **options: Any) -> list[dict[str, Any]]:
    return run_ranks(functools.partial(_update_on_rank, **options), world_size, list(flags), world_size)


@functools.cache
def _alone(
    flags: tuple[Any, ...],
    world_size: int,
    *,
    even: bool = False,
    joined: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    body = functools.partial(_update_alone, even=even, joined=joined, dtype=dtype)
    result: dict[str, Any] = run_ranks(body, 1, list(flags), world_size)[0]
    return result


def _assert_equal(
    found: dict[str, Any],
    expected: dict[str, Any],
    *,
    relative: float = 3e-6,
    of_norm: float = 1e-6,
    drops: bool = False,
) -> None:
    """Each difference is within ``relative`` of the tensor's norm plus ``of_norm`` of the global norm."""
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


def _assert_all_equal(by_rank: list[dict[str, Any]], expected: dict[str, Any], **bounds: float) -> None:
    for found in by_rank:
        _assert_equal(found, expected, **bounds)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("world_size", "experts", "more"), LAYOUTS)
def test_ranks_equal_one_process_with_their_micro_batches(
    world_size: int, experts: int, more: tuple[str, ...], backend: str
) -> None:
    flags = ("--moe-expert-count", experts, *more)
    expected = _alone(flags, world_size)
    assert expected["logged"]["moe_gate_loss"] > 0
    _assert_all_equal(_on_ranks((*flags, "--ddp-backend", backend), world_size), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_large_batch_without_the_gate_loss(world_size: int, backend: str) -> None:
    flags = ("--moe-gate-loss-wt", 0, "--moe-expert-count", 2)  # two experts never drop
    found = _on_ranks((*flags, "--ddp-backend", backend), world_size, even=True)[0]
    expected = _alone(flags, world_size, even=True, joined=True)
    # The statistics are means over micro-batches.
    names = ["loss", "inner_loss", "gnorm", "sample_size", "drop_rate", "entropy_gating"]
    expected = {**expected, "logged": {name: expected["logged"][name] for name in names}}
    _assert_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_freq_clipping_and_activation_checkpointing(backend: str) -> None:
    """All three at once on four ranks; the single process does not checkpoint, and counts its tokens once."""
    flags = ("--moe-expert-count", 2, "--clip-norm", 0.1, "--update-freq", 2)
    expected = _alone(flags, 4)
    assert expected["logged"]["gnorm"] > 0.1
    _assert_all_equal(_on_ranks((*flags, "--checkpoint-activations", "--ddp-backend", backend), 4), expected)


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])  # FSDP computes in float32
def test_double_precision_agrees_to_ten_digits(backend: str) -> None:
    flags = ("--moe-expert-count", 4)
    expected = _alone(flags, 4, dtype=torch.float64)
    assert expected["gradients"]["decoder.layers.1.moe_layer.router.weight"].dtype == torch.float64
    found = _on_ranks((*flags, "--ddp-backend", backend), 4, dtype=torch.float64)
    _assert_all_equal(found, expected, relative=1e-10, of_norm=1e-12)


def _no_division() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    gradients._reduce_expert_grads = lambda module, decoder: None


def _no_sum_over_replicas() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    stock_sum = gradients.all_reduce_sum
    gradients.all_reduce_sum = lambda tensor, group=None: tensor if group is not None else stock_sum(tensor)


def _experts_left_out_of_the_norm() -> None:
    import fairseq_moe.stock.step.gradients as gradients

    gradients.GradNorm._total = lambda self, dense_sq, expert_sq: dense_sq


MUTATIONS: dict[str, Callable[[], None]] = {
    "no division": _no_division,
    "no sum over replicas": _no_sum_over_replicas,
    "experts left out of the norm": _experts_left_out_of_the_norm,
}


@pytest.mark.parametrize(
    ("mutation", "experts", "complaint"),
    [
        ("no division", 4, "gnorm"),
        ("no sum over replicas", 2, "ranks hold different"),
        ("experts left out of the norm", 2, "gnorm"),
    ],
)
def test_these_tests_see_a_wrong_reduction(mutation: str, experts: int, complaint: str) -> None:
    flags = ("--moe-expert-count", experts)
    expected = _alone(flags, 4)
    with pytest.raises(AssertionError, match=complaint):
        _assert_all_equal(_on_ranks((*flags, "--ddp-backend", "legacy_ddp"), 4, mutation=mutation), expected)
