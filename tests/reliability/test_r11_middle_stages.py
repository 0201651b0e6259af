"""R11 in the middle of a pipeline of four stages: what one of them spoils, all of them skip, and it is named.

Run with ``pytest tests/reliability/test_r11_middle_stages.py -m slow_reliability``.
"""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.ranks import run_ranks

_FLAGS = (
    "--pipeline-model-parallel-size", 4, "--optimizer", "adam", "--lr", 0.01, "--min-loss-scale", 1e-4,
)  # fmt: skip
_FOUR, _EIGHT = ("--decoder-layers", 4), ("--decoder-layers", 8, "--num-virtual-stages-per-pipeline-rank", 2)
_FP16 = ("--fp16", "--fp16-no-flatten-grads")
_EXPERT = "decoder.layers.1.moe_layer.experts.fc1_weight"
_DENSE = "decoder.layers.2.fc1.weight"


class Spoilt(NamedTuple):
    """Say what is spoilt, and what all ranks are told.

    Args:
        rank: that spoils it.
        name: of a parameter, whose gradient it is, or of a layer, whose output it is.
        cause: the sentence's beginning; empty: stock's scaler takes half the scale, and says so.
        factor: that what is spoilt is multiplied with.
        flags: of the model and its precision.
    """

    rank: int
    name: str
    cause: str
    factor: float = math.nan
    flags: tuple[Any, ...] = _FOUR


_CASES = {
    "an expert's gradient": Spoilt(1, _EXPERT, f"the gradient of {_EXPERT} on rank 1 is not finite"),
    "a dense gradient": Spoilt(2, _DENSE, f"the gradient of {_DENSE} on rank 2 is not finite"),
    "hidden values": Spoilt(1, "decoder.layers.1", "the output of layer 1 on rank 1 is not finite"),
    "the last hidden values": Spoilt(2, "decoder.layers.2", "the output of layer 2 on rank 2 is not finite"),
    # Layer 6 is behind layers 3 to 5 of other ranks, and before the last one.
    "the second round": Spoilt(
        2, "decoder.layers.6", "the output of layer 6 on rank 2 is not finite", math.inf, _EIGHT
    ),
    "the first round": Spoilt(
        3, "decoder.layers.3", "the output of layer 3 on rank 3 is not finite", math.nan, _EIGHT
    ),
    "the loss": Spoilt(3, "decoder.layers.3", "the loss on rank 3 is not finite"),
    "an overflow": Spoilt(2, _DENSE, "", math.inf, (*_FOUR, *_FP16)),
    "another overflow": Spoilt(1, _EXPERT, "", math.inf, (*_FOUR, *_FP16)),
}


def _spoil(model: Any, case: Spoilt) -> list[bool]:
    """While the list's item is true, this rank spoils a gradient or a layer's output."""
    is_on, factor = [True], case.factor
    names = dict(model.named_parameters())
    if case.name in names:
        names[case.name].register_hook(lambda grad: grad * factor if is_on[0] else grad)
        return is_on

    def spoil(layer: Any, args: Any, output: Any) -> Any:
        if not is_on[0]:
            return output
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    model.get_submodule(case.name).register_forward_hook(spoil)
    return is_on


def _skip(rank: int, save_dir: str, cases: dict[str, Spoilt]) -> dict[str, Any]:
    """Spoil one update of each case; what this rank says, and what has become of parameters, state and scale."""
    from tests.helpers.tiny import build_trainer, make_batch, parameters, update

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fairseq_moe.stock.step.guard").addHandler(handler)
    found = {}
    for name, case in cases.items():
        said.clear()
        trainer = build_trainer([*_FLAGS, *case.flags, "--save-dir", save_dir])
        is_on = _spoil(trainer.get_model(), case) if rank == case.rank else [False]
        before = parameters(trainer)
        batches = [make_batch(seed) for seed in range(4)]
        skipped = update(trainer, batches) == {}
        kept = all(torch.equal(tensor, before[key]) for key, tensor in parameters(trainer).items())
        no_moments = not any(trainer.optimizer.optimizer.state.values())
        scaler = getattr(trainer.optimizer, "scaler", None)
        scale = None if scaler is None else scaler.loss_scale
        is_on[0] = False
        went_on = bool(update(trainer, batches)) and trainer.get_num_updates() == 1
        found[name] = (skipped, kept, no_moments, went_on, [*said], scale)
    return found


@pytest.mark.slow_reliability
@pytest.mark.timeout(600)
def test_what_a_middle_stage_spoils_is_skipped_by_all_and_named(tmp_path: Path) -> None:
    by_rank = run_ranks(_skip, 4, str(tmp_path), _CASES, timeout=560)
    for name, case in _CASES.items():
        for rank, found in enumerate(by_rank):
            *held, said, scale = found[name]
            assert held == [True] * 4, (name, rank)
            assert (scale is None) == bool(case.cause)
            assert scale == by_rank[0][name][-1]
            if not case.cause or rank > 0:
                assert said == []
                continue
            (sentence,) = said
            assert sentence.startswith(case.cause), name
            assert sentence.endswith(
                "; all ranks skip this update (1 in a row after update 0, at 10 the run ends)."
            )
