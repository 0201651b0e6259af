"""What a plan says of sinks and windows: parameters as they are built, operations by hand.

Run with ``pytest tests/unit/planner/test_windows.py``.
"""

from typing import Any

from fairseq_moe.planner.flops import flops_per_token
from fairseq_moe.planner.parameters import model_parts
from tests.helpers.planned import build_on_meta, parse_flags, shape_from
from tests.helpers.presets import WordIds

LAYERS, HEADS, HEAD_DIM, LENGTH = 6, 8, 16, 4096
_FLAGS = (
    "--task", "dummy_lm", "--criterion", "moe_cross_entropy", "--tokens-per-sample", LENGTH, "--batch-size", 1,
    "--arch", "mixtral_8x7b", "--num-experts", 4, "--decoder-layers", LAYERS, "--decoder-embed-dim", 64,
    "--decoder-attention-heads", HEADS, "--decoder-kv-heads", 2, "--decoder-head-dim", HEAD_DIM,
)  # fmt: skip
_WINDOW = ("--attention-window", 128, "--attention-window-layers", "[1,0]*3")
WORDS = WordIds(100)


def shape(*more: Any) -> Any:
    return shape_from(parse_flags([*_FLAGS, *more]), WORDS)


def test_a_window_saves_scores_of_its_layers() -> None:
    # On average a query of 4,096 sees 128 - 128^2 / (2 x 4,096) = 126 positions in place of 2,048; two operations for
    # each value of a score and of a sum of values, in one forward and two backward products.
    saved = LAYERS // 2 * 3 * 2 * 2 * (2048 - 126) * HEADS * HEAD_DIM
    assert flops_per_token(shape(), LENGTH) - flops_per_token(shape(*_WINDOW), LENGTH) == saved


def test_a_window_of_all_positions_saves_nothing() -> None:
    for window in (LENGTH, 2 * LENGTH):
        assert flops_per_token(shape("--attention-window", window), LENGTH) == flops_per_token(
            shape(), LENGTH
        )


def test_sinks_are_parameters_as_they_are_built() -> None:
    sizes = []
    for flags in ((), ("--attention-sinks", *_WINDOW)):
        args = parse_flags([*_FLAGS, *flags])
        planned = sum(entry.numel for part in model_parts(shape_from(args, WORDS)) for entry in part.entries)
        assert planned == build_on_meta(args, WORDS).decoder.size.total
        sizes.append(planned)
    assert sizes[1] - sizes[0] == LAYERS * HEADS
