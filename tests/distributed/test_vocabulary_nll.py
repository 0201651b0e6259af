"""The likelihood over ranks that have other positions and words each equals one process's, with every gradient.

Run with ``pytest tests/distributed/test_vocabulary_nll.py``.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks
from tests.helpers.sharded_logits import (
    AXES,
    OUTSIDE,
    PAD,
    UPPER,
    Found,
    compare,
    micro_batch,
    num_ranks,
    part_of_rank,
)

LENGTHS = (13, 9, 5, 1)
VOCABULARIES = (13, 50, 3)  # none divides by 4, and of 3 words one of 4 ranks has none
# Of rounding to each dtype, in units of the largest gradient; the loss, relative.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-6), torch.bfloat16: (4e-3, 1e-6)}


def assert_equal(found: Found, name: str, of_grad: float, of_loss: float) -> None:
    # A loss below 1 is the logarithm of 1 and a little, and has the rounding of that 1.
    assert abs(float(found.loss - found.whole_loss)) <= of_loss * max(float(found.whole_loss), 1.0), name
    assert found.grad.shape == found.whole_grad.shape, name
    difference = (found.grad.double() - found.whole_grad).abs()
    assert difference.numel() == 0 or float(difference.max()) <= of_grad * UPPER, name


def _all_cases(rank: int, axes: dict[str, int], dtype: torch.dtype) -> dict[str, Found]:
    found = {}
    for length, words, ignore_index in itertools.product(LENGTHS, VOCABULARIES, (OUTSIDE, PAD)):
        logits_BSV, target_BS = micro_batch(length, words, dtype, ignore_index=ignore_index)
        name = f"{length} positions, {words} words, {ignore_index} left out"
        found[name] = compare(axes, logits_BSV, target_BS, ignore_index=ignore_index)
    return found


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_loss_and_gradient_are_those_of_one_process(axes: dict[str, int], dtype: torch.dtype) -> None:
    of_ranks = run_ranks(_all_cases, num_ranks(axes), axes, dtype)
    for found in of_ranks:
        for name, case in found.items():
            assert case.loss.dtype == torch.promote_types(dtype, torch.float32)
            assert case.grad.dtype == dtype
            assert_equal(case, name, *BOUNDS[dtype])
    for name in of_ranks[0]:  # the same bits: nothing later in an update differs between shards
        assert len({float(found[name].loss) for found in of_ranks}) == 1, name
    long = [case for name, case in of_ranks[0].items() if not name.startswith("1 ")]
    assert len(long) == 18 and all(float(case.whole_loss) > 1 for case in long)


def _summed_beside_sharded(rank: int, axes: dict[str, int], dtype: torch.dtype) -> tuple[float, float]:
    from fairseq_moe.criterions.nll import summed_nll

    logits_BSV, target_BS = micro_batch(13, 50, dtype)
    found = compare(axes, logits_BSV, target_BS, ignore_index=OUTSIDE)
    whole = summed_nll(logits_BSV.flatten(0, 1), target_BS.flatten(), ignore_index=OUTSIDE)
    return float(found.loss), float(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_is_that_of_one_rank_of_ours(dtype: torch.dtype) -> None:
    for loss, whole in run_ranks(_summed_beside_sharded, 4, AXES[3], dtype):
        assert loss == pytest.approx(whole, rel=1e-6)


def _by_kernels(rank: int, axes: dict[str, int]) -> tuple[list[Found], int]:
    from unittest import mock

    from fairseq_moe.criterions import vocabulary_nll
    from fairseq_moe.fused import launch

    launch.DEVICES.add("cpu")
    found = []
    with mock.patch.object(vocabulary_nll, "nll", wraps=vocabulary_nll.nll) as forward:
        for dtype, words in itertools.product((torch.float32, torch.bfloat16), (13, 3)):
            logits_BSV, target_BS = micro_batch(5, words, dtype)
            found.append(compare(axes, logits_BSV, target_BS, ignore_index=OUTSIDE))
    return found, forward.call_count


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_kernels_compute_the_same(axes: dict[str, int]) -> None:
    pytest.importorskip("triton")
    calls = []
    for found, num_calls in run_ranks(_by_kernels, num_ranks(axes), axes):
        calls.append(num_calls)
        for case in found:
            of_grad, of_loss = BOUNDS[case.grad.dtype]
            # Triton's interpreter rounds to bfloat16 towards 0.
            assert_equal(case, str(case.grad.dtype), 2 * of_grad, of_loss)
    assert max(calls) == 4 and min(calls) == (
        2 if axes == {"tensor": 4} else 4
    )  # one rank has none of 3 words


def _extreme(rank: int, axes: dict[str, int]) -> dict[str, Found]:
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits_BSV, target_BS = micro_batch(5, 13, dtype, scale=1e4)
        found[str(dtype)] = compare(axes, logits_BSV, target_BS, ignore_index=OUTSIDE)
    # One word of one rank has all the mass: the sums of the others vanish.
    logits_BSV, target_BS = micro_batch(5, 13, torch.float32)
    logits_BSV[..., 12] = 1e4
    found["one word"] = compare(axes, logits_BSV, target_BS, ignore_index=OUTSIDE)
    return found


@pytest.mark.parametrize("axes", [AXES[1], AXES[3]], ids=str)
def test_large_logits_stay_finite(axes: dict[str, int]) -> None:
    for found in run_ranks(_extreme, 4, axes):
        for name, case in found.items():
            assert float(case.whole_loss) > 1e4
            assert case.loss.isfinite() and case.grad.isfinite().all(), name
            # Logits of 1e4 have an absolute error of 1e-3 in float32.
            assert_equal(case, name, 4e-3, 1e-6)


def _nothing_but_padding(rank: int, axes: dict[str, int]) -> tuple[float, bool]:
    logits_BSV, target_BS = micro_batch(9, 13, torch.float32)
    found = compare(axes, logits_BSV, torch.full_like(target_BS, PAD), ignore_index=PAD)
    return float(found.loss), bool(found.grad.any())


def test_a_batch_of_padding_has_no_loss_and_no_gradient() -> None:
    assert run_ranks(_nothing_but_padding, 4, AXES[3]) == [(0.0, False)] * 4


def _collectives(rank: int, axes: dict[str, int]) -> list[list[str]]:
    from unittest import mock

    import torch.distributed as dist

    from fairseq_moe.distributed import sharding

    counted = []
    for kind in ("usual", "padding", "one position"):
        logits_BSV, target_BS = micro_batch(1 if kind == "one position" else 9, 13, torch.float32)
        if kind == "padding":
            target_BS.fill_(OUTSIDE)
        names: list[str] = []

        def noted(name: str, function: Any, names: list[str] = names) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                names.append(name)
                return function(*args, **kwargs)

            return call

        with (
            mock.patch.object(dist, "all_reduce", noted("all_reduce", dist.all_reduce)),
            mock.patch.object(sharding, "all_gather_single", noted("all_gather", sharding.all_gather_single)),
        ):
            compare(axes, logits_BSV, target_BS, ignore_index=OUTSIDE)
        counted.append(names)
    return counted


def test_two_collectives_whatever_the_data() -> None:
    for counted in run_ranks(_collectives, 4, AXES[3]):
        assert counted == [["all_gather", "all_reduce"]] * 3


def _no_word(rank: int, axes: dict[str, int]) -> list[float]:
    from fairseq_moe.criterions.vocabulary_nll import sharded_nll
    from fairseq_moe.distributed.mesh import parallel_mesh

    losses = []
    for wrong in (13, -7):
        logits_BSV, target_BS = micro_batch(9, 13, torch.float32)
        target_BS[1, 3] = wrong
        part, output = part_of_rank(parallel_mesh(4, **axes), logits_BSV)
        losses.append(float(sharded_nll(part, target_BS, output, ignore_index=OUTSIDE)))
    return losses


def test_a_target_that_is_no_word_is_no_finite_loss() -> None:
    assert run_ranks(_no_word, 4, AXES[3]) == [[float("inf")] * 2] * 4


def _everything_counted(rank: int, axes: dict[str, int]) -> tuple[float, float]:
    """What the loss would be if absent positions, or padding, counted as a target of word 0."""
    from unittest import mock

    from fairseq_moe.modules.shards import ShardedOutput

    logits_BSV, target_BS = micro_batch(9, 13, torch.float32)

    def with_absent(self: Any, whole_BS: Tensor, *, ignore_index: int) -> Tensor:
        return self.part.of_context(whole_BS, dim=1, filler=0)

    def with_padding(self: Any, target: Tensor, *, ignore_index: int) -> Tensor:
        column = target.masked_fill(target == ignore_index, 0) - self.first_word
        is_own = (column >= 0) & (column < self.num_words)
        return column.masked_fill(~is_own, self.num_words)

    errors = []
    for name, wrong in (("targets_of", with_absent), ("columns_of", with_padding)):
        with mock.patch.object(ShardedOutput, name, wrong):
            found = compare(axes, logits_BSV, target_BS, ignore_index=OUTSIDE)
        errors.append(float((found.loss - found.whole_loss) / found.whole_loss))
    return errors[0], errors[1]


def test_mutants_that_count_absent_positions_or_padding_differ() -> None:
    for absent, padding in run_ranks(_everything_counted, 4, AXES[3]):
        assert not abs(absent) < 1e-2 and not abs(padding) < 1e-2
