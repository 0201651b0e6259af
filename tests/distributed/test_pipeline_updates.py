"""Updates through stock's Trainer on the stages of a pipeline are those of one process with the same micro-batches.

Three Adam updates each: four micro-batches of four shapes, padded ones among them; one micro-batch, fewer than there
are stages; three, as in an epoch's short last update. Logs on every rank, gradients, parameters, the file with the load
of experts, and a validation. Run with ``pytest tests/distributed/test_pipeline_updates.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.pipelines import (
    P2,
    P4,
    SHAPES,
    V2,
    Case,
    assert_same,
    found_alone,
    found_on_ranks,
)
from tests.helpers.ranks import run_ranks

MEGATRON = (
    "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
    "--num-experts", 4, "--moe-aux-loss-coeff", 0.2, "--use-moe-pad-mask",
)  # fmt: skip
FOUR = ("--decoder-layers", 4, "--moe-layer-freq", "[0,1,0,1]")  # a dense layer first
GPT = (*MEGATRON, *FOUR)
BLOCKS = (
    *GPT, "--moe-ffn-hidden-size", 8, "--decoder-embed-dim", 12, "--decoder-attention-heads", 4,
    "--decoder-kv-heads", 2, "--decoder-normalization", "rmsnorm", "--position-embedding", "rope", "--gated-ffn",
    "--init-std", 0.3, "--moe-shared-expert-intermediate-size", 6,
)  # fmt: skip
LOSSES = (
    "--moe-router-load-balancing-type", "aux_loss seq_aux_loss global_aux_loss", "--moe-aux-loss-coeff", "0.2 0.1 0.3",
    "--moe-z-loss-coeff", 0.1, "--moe-per-layer-logging",
)  # fmt: skip
BIAS = (
    "--moe-router-score-function",
    "sigmoid",
    "--moe-router-enable-expert-bias",
    "--moe-router-bias-update-rate",
    0.1,
)
MTP = ("--mtp-layers", 1, "--mtp-loss-weight", 0.3)
T2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-tensor-parallel-size", 1)


def _untied(width: int) -> tuple[Any, ...]:
    """Of stock's architectures this one alone leaves words untied; its embeddings may have another width."""
    return ("--arch", "transformer_lm", "--decoder-input-dim", width, "--decoder-output-dim", width)


SINGLE = {"dtype": torch.float32, "bound": 1e-5}
# The second data rank has one micro-batch less in the second update, and none in the third.
UNEVEN = (
    (SHAPES[:2], SHAPES[2:]),
    (SHAPES[:2], (SHAPES[3], None)),
    (SHAPES[1:2], (None,)),
)

TWO_RANKS = [
    Case(name="P2", model=(*GPT, *LOSSES)),
    Case(name="P2 in float32", model=(*BLOCKS, *LOSSES), **SINGLE),
    Case(name="P2 V2", model=(*GPT, *LOSSES), layout=(*P2, *V2)),
    Case(name="P2 V2 blocks", model=(*BLOCKS, *LOSSES), layout=(*P2, *V2)),
    Case(name="clipping", model=(*GPT, "--clip-norm", 0.1)),
    Case(name="expert bias", model=(*BLOCKS, *BIAS)),
    Case(
        name="quantile bias",
        model=(*BLOCKS, "--moe-router-load-balancing-type", "quantile_balancing", "--moe-aux-loss-coeff", 0),
        layout=(*P2, *V2),
    ),
    Case(name="frozen experts", model=(*BLOCKS, "--moe-freeze-modules", "experts")),
    Case(name="frozen routers", model=(*BLOCKS, "--moe-freeze-modules", "routers"), layout=(*P2, *V2)),
    Case(name="recomputed experts", model=(*BLOCKS, "--moe-layer-recompute")),
    Case(name="recomputed layers", model=(*BLOCKS, "--checkpoint-activations"), layout=(*P2, *V2)),
    Case(name="recomputed stock layers", model=(*GPT, "--checkpoint-activations")),
    Case(name="MTP", model=(*BLOCKS, *MTP)),
    Case(name="MTP V2", model=(*BLOCKS, *MTP), layout=(*P2, *V2)),
    Case(name="untied, other widths", model=(*GPT, *_untied(6)), is_tied=False),
    Case(name="untied MTP", model=(*BLOCKS, *MTP, *_untied(12)), is_tied=False),
    Case(name="post-norm", model=GPT, is_post_norm=True),
    Case(
        name="NormFormer",
        model=(*GPT, "--scale-fc", "--scale-attn", "--scale-heads", "--scale-resids"),
        layout=(*P2, *V2),
    ),
    Case(name="padding that is routed", model=(*GPT, "--use-moe-pad-mask", "false")),
    Case(name="branch", model=(*FOUR[:2], "--moe-expert-count", 2, "--use-moe-pad-mask")),
    Case(name="uneven stages", model=BLOCKS, layout=(*P2, "--decoder-first-pipeline-num-layers", 1)),
]


# In bfloat16 sums in another order make single tokens choose other experts.
_SUMS = ("loss", "inner_loss", "gnorm", "sample_size")
PRECISIONS = [
    Case(
        name=flags.lstrip("-"),
        model=(*BLOCKS, "--clip-norm", 1.0, *flags.split()),
        dtype=torch.float32,
        bound=bound,
        of_logs=of_logs,
        numbers=numbers,
    )
    for flags, bound, of_logs, numbers in (
        ("--fp16 --fp16-no-flatten-grads", 0.02, 0.005, ()),
        ("--memory-efficient-fp16", 0.02, 0.005, ()),
        ("--bf16", 0.1, 0.02, _SUMS),
        ("--memory-efficient-bf16", 0.1, 0.02, _SUMS),
    )
]
FOUR_RANKS = [
    Case(name="P4", model=(*BLOCKS, *LOSSES, *BIAS), layout=P4, ranks=4),
    Case(name="P2 T2", model=(*BLOCKS, *LOSSES), layout=(*P2, *T2), ranks=4),
    Case(name="P2 V2 T2, stock layers", model=(*GPT, *LOSSES), layout=(*P2, *V2, *T2), ranks=4),
    Case(
        name="T2, padding that is routed",
        model=(*GPT, "--use-moe-pad-mask", "false"),
        layout=(*P2, *T2),
        ranks=4,
    ),
    Case(name="P2 D2", model=BLOCKS, layout=P2, ranks=4, updates=UNEVEN),
    Case(
        name="P2 D2, ZeRO-3",
        model=(*BLOCKS, *MTP),
        layout=(*P2, "--use-torch-fsdp2"),
        ranks=4,
        updates=UNEVEN,
    ),
    Case(
        name="P2 V2 D2, ZeRO-1",
        model=(*BLOCKS, "--clip-norm", 0.1),
        layout=(*P2, *V2, "--use-distributed-optimizer"),
        ranks=4,
        updates=UNEVEN,
    ),
    Case(name="P2 C2", model=(*BLOCKS, *LOSSES), layout=(*P2, "--context-parallel-size", 2), ranks=4),
    Case(name="P2 V2 D2", model=GPT, layout=(*P2, *V2), ranks=4, updates=UNEVEN),
]


def _all_same(cases: list[Case], folder: Path) -> None:
    expected = found_alone(cases, folder)
    found = found_on_ranks(cases, folder)
    wrong = []
    for case in cases:
        try:
            assert_same(case, found[case.name], expected[case.name])
        except AssertionError as error:
            wrong.append(f"{case.name}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parallel
@pytest.mark.timeout(300)
def test_two_stages(tmp_path: Path) -> None:
    _all_same(TWO_RANKS, tmp_path)


@pytest.mark.parallel
@pytest.mark.timeout(300)
def test_four_ranks(tmp_path: Path) -> None:
    _all_same(FOUR_RANKS, tmp_path)


@pytest.mark.parallel
@pytest.mark.timeout(300)
def test_half_precision(tmp_path: Path) -> None:
    _all_same(PRECISIONS, tmp_path)


def _is_skipped(rank: int) -> dict[str, Any]:
    """Let one stage's gradients overflow, or be no numbers; then let the last stage's loss be a spike."""
    import logging

    from fairseq_moe.stock.run import run_of
    from tests.helpers.tiny import build_trainer, make_batch, parameters, update

    found: dict[str, Any] = {}
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fairseq_moe").addHandler(handler)
    batches = [make_batch(seed) for seed in range(2)]
    for name, bad, flags in (
        ("overflow", float("inf"), ("--fp16", "--fp16-no-flatten-grads")),
        ("nan", float("nan"), ("--skip-loss-spikes-factor", 5)),
    ):
        trainer = build_trainer([*GPT, *P2, *flags])
        is_bad = [rank == 0]
        layer = next(layer for layer in trainer.get_model().decoder.layers if layer is not None)
        layer.fc1.weight.register_hook(lambda grad, is_bad=is_bad, bad=bad: grad * bad if is_bad[0] else grad)
        before = parameters(trainer)
        skipped = update(trainer, batches) == {}
        after = parameters(trainer)
        found[name] = {
            "skipped": skipped,
            "same": all(torch.equal(after[key], value) for key, value in before.items()),
            "updates": trainer.get_num_updates(),
            "scale": getattr(getattr(trainer.optimizer, "scaler", None), "loss_scale", None),
        }
        is_bad[0] = False
        assert update(trainer, batches)
    run = run_of(trainer)
    assert run is not None
    run.guard._spikes._losses.extend([0.01 + 0.0001 * (number % 3) for number in range(40)])
    found["spike"] = {"skipped": update(trainer, batches) == {}, "updates": trainer.get_num_updates()}
    found["said"] = [text for text in said if "skip" in text]
    return found


def test_all_stages_skip_what_one_stage_or_the_loss_spoils() -> None:
    by_rank = run_ranks(_is_skipped, 2)
    said = by_rank[0].pop("said")
    assert by_rank[1].pop("said") == []
    assert by_rank[0] == by_rank[1]
    for name in ("overflow", "nan"):
        found = by_rank[0][name]
        assert found["skipped"] and found["same"] and found["updates"] == 0
    assert by_rank[0]["overflow"]["scale"] == 64.0  # half of what it starts with
    assert by_rank[0]["spike"] == {"skipped": True, "updates": 1}
    assert "the gradient of decoder.layers.0.fc1.weight on rank 0 is not finite" in said[0]
    assert "--skip-loss-spikes-factor" in said[-1] and len(said) == 2
