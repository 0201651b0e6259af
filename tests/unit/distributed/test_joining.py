"""Parts of parameters on hand-drawn meshes: their shapes, uneven ones too, and what the whole counts.

Joining takes ranks: tests/distributed/test_placed_states.py.
"""

import pytest
import torch

from fairseq_moe.distributed import ParallelMesh
from fairseq_moe.distributed.joining import cut_part, is_part, part_shape, whole_numel
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import (
    DENSE,
    EXPERT,
    TENSOR_COLUMNS,
    TENSOR_GATED_ROWS,
    TENSOR_ROWS,
    Placement,
    expert_placements,
    vocabulary_placement,
)

STACKS = expert_placements(is_gated=True, is_cut=True)


def mesh_of(rank: int, *, tensor: int = 1, expert_tensor: int = 1, world_size: int = 4) -> ParallelMesh:
    layout = ExpertLayout(
        num_experts=4, world_size=world_size, given_ep_size=1, expert_tensor=expert_tensor, tensor=tensor
    )
    return ParallelMesh(layout=layout, rank=rank)


@pytest.mark.parametrize(
    ("num_words", "rows"), [(7, [1, 2, 2, 2]), (8, [2, 2, 2, 2]), (5, [1, 1, 1, 2]), (4, [1, 1, 1, 1])]
)
def test_words_are_shared_out_evenly_or_nearly_so(num_words: int, rows: list[int]) -> None:
    placement, whole = vocabulary_placement(num_words), torch.arange(num_words * 3.0).view(num_words, 3)
    parts = []
    for rank in range(4):
        mesh = mesh_of(rank, tensor=4)
        part = cut_part(whole, placement, mesh)
        assert part.shape == part_shape(tuple(whole.shape), placement, mesh) == (rows[rank], 3)
        assert whole_numel(part.numel(), placement, mesh) == whole.numel()
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("placement", "shape", "expected"),
    [
        (TENSOR_ROWS, (8, 6), (4, 6)),
        (TENSOR_ROWS, (8,), (4,)),
        (TENSOR_GATED_ROWS, (8, 6), (4, 6)),
        (TENSOR_COLUMNS, (8, 6), (8, 3)),
        (DENSE, (8, 6), (8, 6)),
        (EXPERT, (4, 8, 6), (4, 8, 6)),
        (STACKS["fc1_weight"], (4, 8, 6), (4, 4, 6)),
        (STACKS["fc2_weight"], (4, 6, 8), (4, 6, 4)),
        (STACKS["fc2_bias"], (4, 6), (4, 6)),
    ],
)
def test_shapes_and_sizes_of_equal_parts(
    placement: Placement, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    for rank in range(4):
        mesh = mesh_of(rank, tensor=2, expert_tensor=2)
        part = cut_part(torch.zeros(shape), placement, mesh)
        assert tuple(part.shape) == part_shape(shape, placement, mesh) == expected
        assert whole_numel(part.numel(), placement, mesh) == torch.zeros(shape).numel()
        assert is_part(placement, mesh) == (shape != expected)


def test_gate_and_up_are_cut_each() -> None:
    whole = torch.arange(8.0)
    placement = TENSOR_GATED_ROWS
    assert [cut_part(whole, placement, mesh_of(rank, tensor=2)).tolist() for rank in range(2)] == [
        [0.0, 1.0, 4.0, 5.0],
        [2.0, 3.0, 6.0, 7.0],
    ]


def test_a_shape_that_is_not_the_models_stays_as_it_is_for_the_model_to_refuse() -> None:
    mesh = mesh_of(1, tensor=2)
    assert part_shape((9, 6), TENSOR_ROWS, mesh) == (9, 6)
    assert part_shape((8, 6), vocabulary_placement(7), mesh) == (8, 6)
    assert part_shape((8,), TENSOR_COLUMNS, mesh) == (8,)
