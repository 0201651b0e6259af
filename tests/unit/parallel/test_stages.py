"""Which layers each pipeline rank and virtual stage holds, drawn by hand, and layers that cannot be cut."""

from typing import Any

import pytest

from fairseq_moe.errors import ConfigError
from fairseq_moe.parallel.stages import StageLayout, stage_problem, virtual_stages


def ranges(layout: StageLayout) -> list[list[tuple[int, int]]]:
    """First and last layer of each chunk of each rank."""
    return [
        [
            (layers[0], layers[-1])
            for layers in (layout.layers_of(rank, chunk) for chunk in range(layout.virtual))
        ]
        for rank in range(layout.pipe)
    ]


def test_layers_lie_evenly_on_ranks() -> None:
    assert ranges(StageLayout(num_layers=8, pipe=4)) == [[(0, 1)], [(2, 3)], [(4, 5)], [(6, 7)]]
    assert ranges(StageLayout(num_layers=3)) == [[(0, 2)]]


def test_virtual_stages_go_round_the_ranks() -> None:
    # stage    0   1   2   3   4   5   6   7
    # rank     0   1   2   3   0   1   2   3
    # layers  0-1 2-3 4-5 6-7 8-9 ...     14-15
    layout = StageLayout(num_layers=16, pipe=4, virtual=2)
    assert ranges(layout) == [
        [(0, 1), (8, 9)],
        [(2, 3), (10, 11)],
        [(4, 5), (12, 13)],
        [(6, 7), (14, 15)],
    ]
    assert layout.num_stages == 8
    assert [layout.stage_of_layer(layer) for layer in (0, 3, 7, 8, 15)] == [0, 1, 3, 4, 7]
    assert layout.stage(2, chunk=1) == 6 and layout.place(6) == (2, 1)
    with pytest.raises(ValueError, match="layer 16 is none of 16"):
        layout.stage_of_layer(16)


def test_deepseek_v2_in_two_rounds() -> None:
    layout = StageLayout(num_layers=60, pipe=16, virtual=2, first=2, last=2)
    drawn = ranges(layout)
    assert drawn[0] == [(0, 0), (30, 30)]
    assert drawn[1] == [(1, 2), (31, 32)]
    assert drawn[14] == [(27, 28), (57, 58)]
    assert drawn[15] == [(29, 29), (59, 59)]


def test_deepseek_v3_starts_with_four_and_ends_with_one() -> None:
    drawn = ranges(StageLayout(num_layers=61, pipe=16, first=4, last=1))
    assert drawn[0] == [(0, 3)] and drawn[15] == [(60, 60)]
    assert drawn[1:15] == [[(4 * rank, 4 * rank + 3)] for rank in range(1, 15)]


@pytest.mark.parametrize(
    ("sizes", "per_rank"),
    [
        ({"num_layers": 40, "pipe": 2, "first": 30}, [30, 10]),
        ({"num_layers": 10, "pipe": 4, "last": 1}, [3, 3, 3, 1]),
        ({"num_layers": 27, "pipe": 2, "first": 13, "last": 14}, [13, 14]),
        ({"num_layers": 12, "pipe": 3, "first": 2, "last": 4, "virtual": 2}, [2, 6, 4]),
        ({"num_layers": 10, "pipe": 3, "last": 2, "virtual": 2}, [4, 4, 2]),
    ],
)
def test_ends_have_sizes_of_their_own(sizes: dict[str, int], per_rank: list[int]) -> None:
    layout = StageLayout(**sizes)
    held = [
        sum(len(layout.layers_of(rank, chunk)) for chunk in range(layout.virtual))
        for rank in range(layout.pipe)
    ]
    assert held == per_rank


@pytest.mark.parametrize("pipe", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize("ends", [(None, None), (6, None), (None, 6), (6, 12)])
def test_stages_follow_one_another_and_hold_each_layer_once(
    pipe: int, virtual: int, ends: tuple[int | None, int | None]
) -> None:
    first, last = ends
    if pipe == 1 and (virtual > 1 or ends != (None, None)):
        return  # refused
    middle = pipe - (first is not None) - (last is not None)
    num_layers = 6 * middle + (first or 0) + (last or 0)
    layout = StageLayout(num_layers=num_layers, pipe=pipe, virtual=virtual, first=first, last=last)
    passed = [
        layer
        for stage in range(layout.num_stages)
        for layer in layout.layers_of(*layout.place(stage))
        if layout.stage_of_layer(layer) == stage
    ]
    assert passed == list(range(num_layers))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"pipe": 0}, "--pipeline-model-parallel-size is 0, expected at least 1."),
        ({"virtual": 0}, "--num-virtual-stages-per-pipeline-rank is 0, expected at least 1."),
        ({"first": 0}, "--decoder-first-pipeline-num-layers is 0, expected at least 1."),
        (
            {"virtual": 2, "layers_per_stage": 2},
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage are two ways to say "
            "the same; give one of them.",
        ),
        (
            {"layers_per_stage": 2, "last": 2},
            "--num-layers-per-virtual-pipeline-stage does not say how to cut ranks of different sizes "
            "(--decoder-last-pipeline-num-layers); give --num-virtual-stages-per-pipeline-rank instead.",
        ),
        (
            {"pipe": 1, "virtual": 2},
            "--num-virtual-stages-per-pipeline-rank needs several pipeline ranks; give "
            "--pipeline-model-parallel-size above 1 too, or drop it.",
        ),
        (
            {"pipe": 1, "layers_per_stage": 6},
            "--num-layers-per-virtual-pipeline-stage needs several pipeline ranks; give "
            "--pipeline-model-parallel-size above 1 too, or drop it.",
        ),
        (
            {"pipe": 1, "first": 4},
            "--decoder-first-pipeline-num-layers needs several pipeline ranks; give "
            "--pipeline-model-parallel-size above 1 too, or drop it.",
        ),
        (
            {"pipe": 16},
            "--pipeline-model-parallel-size is 16, expected at most the 12 layers; each rank needs one.",
        ),
        (
            {"pipe": 5},
            "12 layers do not divide by --pipeline-model-parallel-size 5; choose a divisor, or give the end ranks "
            "layers of their own by --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers.",
        ),
        (
            {"pipe": 4, "first": 1},
            "With --decoder-first-pipeline-num-layers 1, 11 of 12 layers are for the other 3 of 4 pipeline ranks, "
            "expected a multiple of 3 above 0; change one of these numbers.",
        ),
        (
            {"pipe": 4, "first": 6, "last": 6},
            "With --decoder-first-pipeline-num-layers 6 and --decoder-last-pipeline-num-layers 6, 0 of 12 layers are "
            "for the other 2 of 4 pipeline ranks, expected a multiple of 2 above 0; change one of these numbers.",
        ),
        (
            {"pipe": 2, "first": 6, "last": 5},
            "--decoder-first-pipeline-num-layers 6 and --decoder-last-pipeline-num-layers 5 are all 2 ranks, "
            "expected 12 layers in sum.",
        ),
        (
            {"pipe": 4, "virtual": 4},
            "--pipeline-model-parallel-size 4 times --num-virtual-stages-per-pipeline-rank 4 is 16 stages, expected "
            "at most the 12 layers; each stage needs one.",
        ),
        (
            {"pipe": 4, "virtual": 2},
            "--num-virtual-stages-per-pipeline-rank is 2, expected a divisor of the 3 layers of pipeline rank 0.",
        ),
        (
            {"pipe": 4, "virtual": 2, "first": 2, "last": 2},
            None,
        ),
        (
            {"pipe": 4, "virtual": 2, "first": 2, "last": 4},
            "--num-virtual-stages-per-pipeline-rank is 2, expected a divisor of the 3 layers of pipeline rank 1.",
        ),
        (
            {"pipe": 4, "layers_per_stage": 2},
            "--num-layers-per-virtual-pipeline-stage is 2, expected a divisor of the 3 layers of each rank.",
        ),
        ({"pipe": 4, "layers_per_stage": 1}, None),
        ({"pipe": 1, "virtual": 1}, None),
        ({"pipe": 1, "layers_per_stage": 12}, None),
    ],
)
def test_layers_that_cannot_be_cut_are_refused_in_a_sentence(
    sizes: dict[str, Any], sentence: str | None
) -> None:
    assert stage_problem(**{"num_layers": 12, "pipe": 2, **sizes}) == sentence


def test_a_layout_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ConfigError, match="12 layers do not divide"):
        StageLayout(num_layers=12, pipe=5)


def test_layers_per_virtual_stage_are_another_way_to_say_v() -> None:
    # Megatron's references: Mixtral 8x7B 32 layers, P 4, V 8; 8x22B 56 layers, P 8, V 7
    assert virtual_stages(num_layers=32, pipe=4, layers_per_stage=1) == 8
    assert virtual_stages(num_layers=56, pipe=8, layers_per_stage=1) == 7
