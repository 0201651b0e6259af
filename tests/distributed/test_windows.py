"""Windows and sinks on tensor, context and pipeline ranks: one process's gradients in float64; mistakes are seen.

Ranks look through windows block by block, the one process with a mask. Run with
``pytest tests/distributed/test_windows.py``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.axes import C2, T2X2, numbers_of_ranks
from tests.helpers.block_models import MODELS
from tests.helpers.complaint import complaint
from tests.helpers.ranks import run_ranks

Patch = pytest.MonkeyPatch
WINDOW, MARKS = 3, (1, 0, 0, 1)
MODEL = (
    *MODELS["grouped"], "--decoder-layers", 4, "--moe-layer-freq", "[0,1]*2", "--attention-window", WINDOW,
    "--attention-window-layers", "[1,0,0,1]", "--use-moe-pad-mask", "false",
)  # fmt: skip
P2 = ("--pipeline-model-parallel-size", 2)
RECOMPUTED = "--checkpoint-activations"


def attentions(decoder: Any) -> list[Any]:
    return [layer.self_attn for layer in decoder.layers if layer is not None]


def nothing(patch: Patch, decoder: Any) -> None:
    pass


def a_window_of_one_more(patch: Patch, decoder: Any) -> None:
    for attention in attentions(decoder):
        if attention.config.window is not None:
            patch.setattr(attention, "config", replace(attention.config, window=WINDOW + 1))


def one_key_too_few_for_a_chunk(patch: Patch, decoder: Any) -> None:
    import fairseq_moe.modules.blocks.grouped as grouped

    over_context = grouped.attend_over_context

    def short(*args: Any, window: int | None, **more: Any) -> Any:
        return over_context(*args, window=None if window is None else window - 1, **more)

    patch.setattr(grouped, "attend_over_context", short)


def sinks_left_out(patch: Patch, decoder: Any) -> None:
    import fairseq_moe.modules.blocks.grouped as grouped

    attend = grouped.attend
    patch.setattr(
        grouped, "attend", lambda *args, sinks_H, **more: attend(*args, sinks_H=sinks_H * 0 - 1e4, **more)
    )


def sinks_not_summed_over_context(patch: Patch, decoder: Any) -> None:
    import fairseq_moe.stock.step.gradients as gradients

    sinks = {id(attention.sinks) for attention in attentions(decoder)}
    stock_sum = gradients.sum_over_copies

    def others(parameters: Any, *args: Any, **more: Any) -> None:
        stock_sum([p for p in parameters if id(p) not in sinks], *args, **more)

    patch.setattr(gradients, "sum_over_copies", others)


def sinks_of_other_heads(patch: Patch, decoder: Any) -> None:
    for attention in attentions(decoder):
        attention.sinks.data = attention.sinks.data.flip(0)


def windows_by_number_within_the_stage(patch: Patch, decoder: Any) -> None:
    for attention, mark in zip(attentions(decoder), MARKS, strict=False):
        patch.setattr(attention, "config", replace(attention.config, window=WINDOW if mark else None))


CASES: list[tuple[tuple[Any, ...], Callable[[Patch, Any], None], str]] = [
    ((*T2X2, RECOMPUTED), nothing, ""),
    (T2X2, a_window_of_one_more, "logged"),
    (T2X2, sinks_left_out, "logged"),
    (T2X2, sinks_of_other_heads, "logged"),
    ((*C2, RECOMPUTED), nothing, ""),
    (C2, one_key_too_few_for_a_chunk, "logged"),
    (C2, sinks_not_summed_over_context, "differ between ranks"),
    (P2, nothing, ""),
    (P2, windows_by_number_within_the_stage, "logged"),
]


def updated(rank: int, cases: list[tuple[tuple[Any, ...], Callable[[Patch, Any], None]]]) -> list[Any]:
    """Do one update of each layout with its mistake."""
    import fairseq_moe.modules.blocks.window as window
    from fairseq_moe.distributed import world_size
    from fairseq_moe.errors import RanksDisagreeError
    from tests.helpers.tiny import build_trainer, gradients, make_batch, update

    found: list[Any] = []
    for flags, mutate in cases:
        trainer = build_trainer([*MODEL, *flags], dtype=torch.float64)
        batches = [make_batch(number, length=length, num_padded=2) for number, length in enumerate((13, 5))]
        with pytest.MonkeyPatch.context() as patch:
            if world_size() > 1:
                patch.setattr(window, "_MIN_BLOCK", 1)
            mutate(patch, trainer.get_model().decoder)
            try:
                logged = numbers_of_ranks(update(trainer, batches))
                found.append({"logged": logged, "gradients": gradients(trainer)})
            except (RanksDisagreeError, AssertionError) as error:
                found.append(str(error))
    return found


def test_each_layout_equals_one_process_and_each_mistake_is_seen() -> None:
    (expected,) = run_ranks(updated, 1, [((), nothing)])[0]
    assert sum("self_attn.sinks" in name for name in expected["gradients"]) == len(MARKS)
    by_rank = run_ranks(updated, 2, [case[:2] for case in CASES], timeout=110)
    for index, (layout, mutate, words) in enumerate(CASES):
        for rank, found in enumerate(by_rank):
            said = complaint(found[index], expected)
            assert words in said and bool(words) is bool(said), (layout, mutate.__name__, rank, said)
