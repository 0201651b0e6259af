"""Among how many ranks a run has divided its data, read from what its files say."""

from types import SimpleNamespace
from typing import Any

import pytest

from fairseq_moe.stock.checkpoint.reading import _num_data_ranks


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, 8),
        ({"tensor_model_parallel_size": None, "context_parallel_size": None}, 8),
        ({"tensor_model_parallel_size": 2}, 4),
        ({"tensor_model_parallel_size": 2, "context_parallel_size": 4}, 1),
        (SimpleNamespace(context_parallel_size=2), 4),
    ],
)
def test_ranks_that_share_micro_batches_count_once(model: Any, expected: int) -> None:
    cfg = {"distributed_training": {"distributed_world_size": 8}, "model": model}
    assert _num_data_ranks({"cfg": cfg}) == expected


def test_old_files_name_flags_without_groups() -> None:
    assert _num_data_ranks({"args": SimpleNamespace(distributed_world_size=4)}) == 4
