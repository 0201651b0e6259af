"""Assignments sorted by expert: kernel, twin and a sort in plain Python have the same order."""

import pytest
import torch
from torch import Tensor

from fairseq_moe.fused import sort_rows
from fairseq_moe.fused.sort_rows import sort_assignments, sort_assignments_slowly


def assignments(num_tokens: int, top_k: int, num_experts: int, kept: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * 31 + num_experts)
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    return ids_TK, torch.rand(num_tokens, top_k, generator=generator) < kept


def by_python(ids_TK: Tensor, kept_TK: Tensor) -> tuple[list[int], list[int]]:
    """Assignments in order, and the row of each."""
    ids, kept = ids_TK.reshape(-1).tolist(), kept_TK.reshape(-1).tolist()
    order = sorted(range(len(ids)), key=lambda each: (not kept[each], ids[each] if kept[each] else 0, each))
    row_of = {each: row for row, each in enumerate(order)}
    return order, [row_of[each] if kept[each] else -1 for each in range(len(ids))]


def check(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> None:
    assignment_A, row_TK = sort_assignments(ids_TK, kept_TK, num_experts=num_experts)
    order, rows = by_python(ids_TK, kept_TK)
    assert assignment_A.tolist() == order
    assert row_TK.shape == ids_TK.shape
    assert row_TK.reshape(-1).tolist() == rows
    assert assignment_A.dtype is row_TK.dtype is torch.int64
    for found, slow in zip(
        (assignment_A, row_TK), sort_assignments_slowly(ids_TK, kept_TK, num_experts=num_experts), strict=True
    ):
        assert torch.equal(found, slow)


@pytest.mark.parametrize("kept", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 1, 1), (1, 3, 5), (37, 2, 8), (300, 4, 100)], ids=str)
def test_rows_of_experts_with_what_was_dropped_behind_them(shape: tuple[int, int, int], kept: float) -> None:
    check(*assignments(*shape, kept), shape[-1])


def test_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sort_rows, "_BLOCK_A", 8)
    monkeypatch.setattr(sort_rows, "_TILE_A", 4)
    monkeypatch.setattr(sort_rows, "_BLOCK_E", 4)
    check(*assignments(21, 3, 11, 0.7), 11)


def test_one_expert_takes_all_and_the_last_block_is_full() -> None:
    check(torch.full((sort_rows._BLOCK_A, 2), 6), torch.ones(sort_rows._BLOCK_A, 2, dtype=torch.bool), 7)


def test_many_experts() -> None:
    check(*assignments(130, 2, 1024, 0.9), 1024)


def test_input_that_is_not_contiguous() -> None:
    ids_TK, kept_TK = assignments(40, 6, 9, 0.5)
    check(ids_TK[::2, ::3], kept_TK.t().contiguous().t()[::2, ::3], 9)
    mask_T = torch.arange(40) % 3 > 0
    check(ids_TK, mask_T.unsqueeze(-1).expand(40, 6), 9)
