"""Planned activations are within a tenth of the bytes that autograd keeps, for four families at three sizes each.

Counted: storages that ``saved_tensors_hooks`` sees in one forward pass and loss, each once, parameters left out; one
rank, on a CPU, whose path is the one that is planned. Run with ``pytest tests/unit/planner/test_activations.py``.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY

from fairseq_moe.planner.activations import Activations
from tests.helpers.kept_bytes import kept_bytes
from tests.helpers.planned import mapping_from, parse_flags, shape_from
from tests.helpers.presets import WordIds, build_model

WITHIN = 0.10
_BASE = ("--task", "dummy_lm", "--criterion", "moe_cross_entropy", "--dropout", 0, "--attention-dropout", 0)
_GPT = (
    "--arch", "transformer_lm_gpt", "--moe-freq", 2, "--moe-expert-count", 4, "--moe-second-expert-policy", "all",
    "--moe-gate-loss-wt", 0.1, "--share-decoder-input-output-embed",
)  # fmt: skip
_GROUPED = ("--arch", "mixtral_8x7b", "--num-experts", 4, "--moe-layer-freq", "[0,1]*{half}")
_LATENT = (
    "--arch", "deepseek_v3", "--num-experts", 8, "--moe-router-topk", 2, "--moe-router-num-groups", 2,
    "--moe-router-group-topk", 1, "--kv-lora-rank", 32, "--q-lora-rank", 48, "--qk-nope-head-dim", 24,
    "--qk-rope-head-dim", 8, "--v-head-dim", 16, "--moe-layer-freq", "[0,1]*{half}",
)  # fmt: skip
_SINKS = ("--attention-sinks",)
_WINDOWS = ("--attention-window", 16, "--attention-window-layers", 2)


def _sized(layers: int, dim: int, heads: int, ffn: int, *more: Any) -> tuple[Any, ...]:
    return (
        "--decoder-layers", layers, "--decoder-embed-dim", dim, "--decoder-attention-heads", heads,
        "--decoder-ffn-embed-dim", ffn, *more,
    )  # fmt: skip


# Family -> flags of three sizes, each with sequences, positions and words. Where routing is skewed, as it is in new
# models, the branch drops rows at its capacity, which a plan does not: of two experts each token has both.
SIZES: dict[str, tuple[tuple[tuple[Any, ...], int, int, int], ...]] = {
    "branch's GPT": (
        ((*_GPT, *_sized(2, 64, 4, 128)), 2, 64, 200),
        ((*_GPT, *_sized(4, 96, 6, 384, "--activation-fn", "relu", "--moe-expert-count", 2)), 3, 48, 120),
        ((*_GPT, *_sized(2, 48, 2, 96, "--decoder-learned-pos", "--moe-expert-ffn-dim", 160)), 1, 160, 64),
    ),
    "grouped blocks": (
        ((*_GROUPED, *_sized(2, 64, 4, 160, "--decoder-kv-heads", 2, "--moe-ffn-hidden-size", 96)), 2, 64, 200),
        ((*_GROUPED, *_sized(4, 96, 8, 128, "--decoder-kv-heads", 4, "--moe-ffn-hidden-size", 64, "--qk-norm", "head",
          "--decoder-head-dim", 16)), 1, 128, 90),
        ((*_GROUPED, *_sized(2, 48, 4, 96, "--decoder-kv-heads", 4, "--moe-ffn-hidden-size", 200,
          "--moe-shared-expert-intermediate-size", 80, "--moe-shared-expert-gate")), 3, 40, 300),
    ),
    "windows and sinks": (
        ((*_GROUPED, *_sized(2, 64, 4, 160, "--decoder-kv-heads", 2, "--moe-ffn-hidden-size", 96, *_SINKS)),
         2, 64, 200),
        ((*_GROUPED, *_sized(4, 96, 8, 128, "--decoder-kv-heads", 2, "--moe-ffn-hidden-size", 64, "--attention-bias",
          "all", *_SINKS, *_WINDOWS)), 2, 192, 90),
        ((*_GROUPED, *_sized(2, 48, 4, 96, "--decoder-kv-heads", 4, "--moe-ffn-hidden-size", 200, *_WINDOWS)),
         1, 60, 300),
    ),
    "latent blocks": (
        ((*_LATENT, *_sized(2, 64, 4, 160, "--moe-ffn-hidden-size", 96, "--moe-shared-expert-intermediate-size", 80)),
         2, 64, 200),
        ((*_LATENT, *_sized(4, 96, 8, 128, "--moe-ffn-hidden-size", 48, "--moe-shared-expert-intermediate-size", 64)),
         1, 96, 90),
        ((*_LATENT, *_sized(2, 128, 2, 256, "--moe-ffn-hidden-size", 160, "--moe-shared-expert-intermediate-size",
          96)), 2, 48, 300),
    ),
}  # fmt: skip
RECOMPUTED = {
    "nothing": (),
    "layers": ("--checkpoint-activations",),
    "MoE layers": ("--moe-layer-recompute",),
    "experts": ("--moe-recompute-modules", "experts"),
}


def _planned_and_kept(
    flags: tuple[Any, ...], sequences: int, length: int, words: int, dtype: torch.dtype
) -> tuple[int, int]:
    half = flags[flags.index("--decoder-layers") + 1] // 2
    flags = tuple(str(flag).replace("{half}", str(half)) for flag in flags)
    args = parse_flags([*_BASE, *flags, "--tokens-per-sample", length, "--batch-size", sequences])
    dictionary = WordIds(words, pad=1 if "transformer_lm_gpt" in flags else None)
    torch.manual_seed(0)
    model = build_model(args, dictionary).to(dtype).train()
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    criterion = CRITERION_REGISTRY["moe_cross_entropy"].build_criterion(args, task)
    ids = torch.randint(4, words, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    sample = {
        "nsentences": sequences,
        "ntokens": sequences * length,
        "net_input": {"src_tokens": ids[:, :-1].clone(), "src_lengths": torch.full((sequences,), length)},
        "target": ids[:, 1:].clone(),
    }
    planned = Activations(
        shape=shape_from(args, dictionary),
        mapping=mapping_from(args, num_ranks=1),
        value_bytes=dtype.itemsize,
        on_gpu=False,
    ).stage(0)
    return planned.kept + planned.logits, kept_bytes(model, criterion, sample)


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("size", range(3))
@pytest.mark.parametrize("family", SIZES)
def test_planned_bytes_are_those_that_autograd_keeps(family: str, size: int, recomputed: str) -> None:
    flags, *sizes = SIZES[family][size]
    planned, kept = _planned_and_kept((*flags, *RECOMPUTED[recomputed]), *sizes, torch.float32)
    assert planned == pytest.approx(kept, rel=WITHIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_planned_bytes_of_clamped_networks(dtype: torch.dtype) -> None:
    flags, *sizes = SIZES["grouped blocks"][2]  # with a shared network
    biased = ("--swiglu-limit", 0.5, "--gated-ffn-bias", "--moe-router-bias")
    planned, kept = _planned_and_kept((*flags, *biased), *sizes, dtype)
    assert planned == pytest.approx(kept, rel=WITHIN)
    assert planned > 1.05 * _planned_and_kept(flags, *sizes, dtype)[0]


@pytest.mark.parametrize("family", ["grouped blocks", "windows and sinks", "latent blocks"])
def test_planned_bytes_in_half_precision(family: str) -> None:
    # GELU networks of the branch keep one more tensor on CPUs that multiply bfloat16 (modules/kernels/sliced.py).
    for flags, *sizes in SIZES[family]:
        planned, kept = _planned_and_kept(flags, *sizes, torch.bfloat16)
        assert planned == pytest.approx(kept, rel=WITHIN)
