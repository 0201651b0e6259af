"""The same update on 1, 2 and 4 ranks: losses, norm, every gradient and the step.

Run with ``pytest tests/distributed/test_training_equality.py``.

W ranks must equal one process that takes the ranks' batches as the micro-batches of ``--update-freq W``; and,
without the balance loss (a product of means, so it depends on the micro-batch), one large batch.
"""

import pytest
import torch

from tests.helpers.updates import alone, assert_all_equal, assert_equal, on_ranks

BACKENDS = ["legacy_ddp", "pytorch_ddp", "fully_sharded"]
LAYOUTS = [  # (world size, experts, further flags)
    pytest.param(2, 4, (), id="2-ranks-4-experts"),
    pytest.param(4, 4, (), id="4-ranks-4-experts"),
    pytest.param(4, 2, (), id="4-ranks-2-experts-each-twice"),
    pytest.param(2, 1, ("--moe-top1-expert",), id="2-ranks-1-expert-held-twice"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("world_size", "experts", "more"), LAYOUTS)
def test_ranks_equal_one_process_with_their_micro_batches(
    world_size: int, experts: int, more: tuple[str, ...], backend: str
) -> None:
    flags = ("--moe-expert-count", experts, *more)
    expected = alone(flags, world_size)
    assert expected["logged"]["moe_gate_loss"] > 0
    assert_all_equal(on_ranks((*flags, "--ddp-backend", backend), world_size), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_large_batch_without_the_gate_loss(world_size: int, backend: str) -> None:
    flags = ("--moe-gate-loss-wt", 0, "--moe-expert-count", 2)  # two experts never drop
    found = on_ranks((*flags, "--ddp-backend", backend), world_size, even=True)[0]
    expected = alone(flags, world_size, even=True, joined=True)
    # The statistics are means over micro-batches.
    names = ["loss", "inner_loss", "gnorm", "sample_size", "drop_rate", "entropy_gating"]
    expected = {**expected, "logged": {name: expected["logged"][name] for name in names}}
    assert_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_freq_clipping_and_activation_checkpointing(backend: str) -> None:
    """All three at once on four ranks; the single process does not checkpoint, and counts its tokens once."""
    flags = ("--moe-expert-count", 2, "--clip-norm", 0.1, "--update-freq", 2)
    expected = alone(flags, 4)
    assert expected["logged"]["gnorm"] > 0.1
    assert_all_equal(on_ranks((*flags, "--checkpoint-activations", "--ddp-backend", backend), 4), expected)


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])  # FSDP computes in float32
def test_double_precision_agrees_to_ten_digits(backend: str) -> None:
    flags = ("--moe-expert-count", 4)
    expected = alone(flags, 4, dtype=torch.float64)
    assert expected["gradients"]["decoder.layers.1.moe_layer.router.weight"].dtype == torch.float64
    found = on_ranks((*flags, "--ddp-backend", backend), 4, dtype=torch.float64)
    assert_all_equal(found, expected, relative=1e-10, of_norm=1e-12)


@pytest.mark.parametrize(
    ("mutation", "experts", "complaint"),
    [
        ("no division", 4, "gnorm"),
        ("no sum over replicas", 2, "gradients of an expert differ between ranks"),
        ("experts left out of the norm", 2, "gnorm"),
    ],
)
def test_these_tests_see_a_wrong_reduction(mutation: str, experts: int, complaint: str) -> None:
    flags = ("--moe-expert-count", experts)
    expected = alone(flags, 4)
    with pytest.raises(AssertionError, match=complaint):
        assert_all_equal(on_ranks((*flags, "--ddp-backend", "legacy_ddp"), 4, mutation=mutation), expected)
