"""Name layouts of all axes by their flags, with tiny models that fit all of them."""

from dataclasses import dataclass
from typing import Any

__all__ = ["LAYOUTS", "MODELS", "PIPELINES", "WINDOWS", "AxesLayout"]

_EXPERTS = (
    "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
    "--num-experts", 4, "--moe-ffn-hidden-size", 8, "--moe-aux-loss-coeff", 0.2, "--decoder-attention-heads", 4,
)  # fmt: skip
_BLOCKS = (
    *_EXPERTS, "--decoder-layers", 4, "--moe-layer-freq", "[0,1,0,1]", "--decoder-normalization", "rmsnorm",
    "--position-embedding", "rope", "--gated-ffn", "--no-scale-embedding", "--init-std", 0.3,
    "--decoder-embed-dim", 12, "--moe-shared-expert-intermediate-size", 6,
)  # fmt: skip
_EVERY_BIAS = ("--gated-ffn-bias", "--swiglu-limit", 1.0, "--moe-router-bias")
WINDOWS = ("--attention-window", 3, "--attention-window-layers", "[1,0,0,1]")
# Four tensor ranks divide each of them, and four stages have a layer each. None drops a token, whatever the rank: there
# is no capacity.
MODELS: dict[str, tuple[Any, ...]] = {
    "grouped": (
        *_BLOCKS, "--decoder-kv-heads", 4, "--decoder-head-dim", 4, "--qk-norm", "full", "--attention-bias", "qkv",
        "--moe-shared-expert-gate", *_EVERY_BIAS, "--attention-sinks", *WINDOWS,
    ),
    "latent": (
        *_BLOCKS, "--kv-lora-rank", 10, "--q-lora-rank", 6, "--qk-nope-head-dim", 4, "--qk-rope-head-dim", 2,
        "--v-head-dim", 5, "--attention-bias", "none", "--moe-router-score-function", "sigmoid",
        "--moe-router-enable-expert-bias", "--moe-router-dtype", "fp32",
    ),
    "stock-like": (*_EXPERTS, "--decoder-layers", 4, "--moe-layer-freq", "[0,1,0,1]"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AxesLayout:
    """Describe how a run is spread.

    Args:
        ranks: how many.
        flags: what concerns them.
        data: ranks, or groups of ranks, that read other micro-batches.
    """

    ranks: int
    flags: tuple[Any, ...]
    data: int


_LEGACY = ("--ddp-backend", "legacy_ddp")
_T2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
_T4 = ("--tensor-model-parallel-size", 4, "--sequence-parallel")
_C2, _C4 = ("--context-parallel-size", 2), ("--context-parallel-size", 4)
_E2 = ("--expert-model-parallel-size", 2)
_X1, _X2 = ("--expert-tensor-parallel-size", 1), ("--expert-tensor-parallel-size", 2)
_ZERO1, _ZERO3 = ("--use-distributed-optimizer",), ("--use-torch-fsdp2",)

LAYOUTS = {
    "alone": AxesLayout(ranks=1, flags=(), data=1),
    "2 ranks": AxesLayout(ranks=2, flags=_LEGACY, data=2),
    "T2 X2": AxesLayout(ranks=2, flags=_T2, data=1),
    "C2 E2": AxesLayout(ranks=2, flags=_C2, data=1),
    "D4 E4": AxesLayout(ranks=4, flags=_LEGACY, data=4),
    "D2 T2 E2": AxesLayout(ranks=4, flags=(*_T2, *_E2, *_X1), data=2),
    "D2 T2 X2": AxesLayout(ranks=4, flags=(*_T2, *_X2), data=2),
    "T4 E4": AxesLayout(ranks=4, flags=(*_T4, *_X1), data=1),
    "D2 C2 E2": AxesLayout(ranks=4, flags=(*_C2, *_E2), data=2),
    "C2 T2 E4": AxesLayout(ranks=4, flags=(*_C2, *_T2, *_X1), data=1),
    "C2 T2 E2 X2": AxesLayout(ranks=4, flags=(*_C2, *_T2, *_X2), data=1),
    "C4 E4": AxesLayout(ranks=4, flags=_C4, data=1),
    "D2 T2 E2, ZeRO-1": AxesLayout(ranks=4, flags=(*_T2, *_E2, *_X1, *_ZERO1), data=2),
    "D2 C2 E2, ZeRO-3": AxesLayout(ranks=4, flags=(*_C2, *_E2, *_ZERO3), data=2),
    "extended: T2 X4": AxesLayout(ranks=4, flags=(*_T2, *_E2, "--moe-extended-tp"), data=2),
}

_P2, _P4 = ("--pipeline-model-parallel-size", 2), ("--pipeline-model-parallel-size", 4)
_V2 = ("--num-virtual-stages-per-pipeline-rank", 2)
PIPELINES = {
    "P2": AxesLayout(ranks=2, flags=_P2, data=1),
    "P2 V2": AxesLayout(ranks=2, flags=(*_P2, *_V2), data=1),
    "P4": AxesLayout(ranks=4, flags=_P4, data=1),
    "P2 T2": AxesLayout(ranks=4, flags=(*_P2, *_T2), data=1),
    "P2 D2, ZeRO-1": AxesLayout(ranks=4, flags=(*_P2, *_ZERO1), data=2),
    "P2 V2 C2, ZeRO-3": AxesLayout(ranks=4, flags=(*_P2, *_V2, *_C2, *_ZERO3), data=1),
}
LAYOUTS |= PIPELINES
