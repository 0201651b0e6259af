"""Sums of many tensors in few collectives."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks


def _sum(rank: int, bucket_numel: int) -> tuple[list[Any], int]:
    from fairseq_moe.distributed.buckets import sum_in_buckets

    tensors = [torch.full((3, 2), 1.0 + rank), torch.full((4,), 10.0 * rank, dtype=torch.float64)]
    tensors += [torch.arange(6.0).view(2, 3).t() * (rank + 1), torch.zeros(0), torch.full((), 5.0)]
    calls, real = [], dist.all_reduce
    dist.all_reduce = lambda tensor, group=None: (calls.append(tensor.numel()), real(tensor, group=group))
    sum_in_buckets(tensors, None, bucket_numel=bucket_numel)
    return [tensor.tolist() for tensor in tensors], calls


@pytest.mark.parametrize(
    ("bucket_numel", "sizes"),
    [(2**28, [13, 4]), (12, [12, 1, 4]), (6, [6, 6, 1, 4]), (1, [6, 6, 1, 4])],
)
def test_sums_are_those_of_single_tensors_whatever_travels_together(
    bucket_numel: int, sizes: list[int]
) -> None:
    expected = [
        torch.full((3, 2), 3.0).tolist(),
        [10.0] * 4,
        (torch.arange(6.0).view(2, 3).t() * 3).tolist(),
        [],
        10.0,
    ]
    for found, calls in run_ranks(_sum, 2, bucket_numel):
        assert found == expected
        assert calls == sizes


def test_no_tensor_is_no_collective() -> None:
    from fairseq_moe.distributed.buckets import sum_in_buckets

    sum_in_buckets([], None)
