"""Flags of tiny models of our own blocks: what the published families are made of."""

from typing import Any

__all__ = ["MODELS"]

_EXPERTS = (
    "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
    "--num-experts", 4, "--moe-ffn-hidden-size", 6, "--moe-aux-loss-coeff", 0.2, "--decoder-layers", 3,
    "--moe-layer-freq", "[0,1,1]", "--decoder-normalization", "rmsnorm", "--position-embedding", "rope",
    "--gated-ffn", "--no-scale-embedding", "--init-std", 0.3, "--decoder-embed-dim", 12,
)  # fmt: skip
MODELS: dict[str, tuple[Any, ...]] = {
    "grouped": (
        *_EXPERTS, "--decoder-attention-heads", 4, "--decoder-kv-heads", 2, "--decoder-head-dim", 4,
        "--qk-norm", "head", "--attention-bias", "qkv", "--moe-router-pre-softmax",
        "--moe-shared-expert-intermediate-size", 6, "--moe-shared-expert-gate", "--gated-ffn-bias",
        "--swiglu-limit", 1.0, "--moe-router-bias",
        "--attention-sinks", "--attention-window", 3, "--attention-window-layers", 2,
    ),
    "latent": (
        *_EXPERTS, "--kv-lora-rank", 10, "--q-lora-rank", 6, "--qk-nope-head-dim", 4, "--qk-rope-head-dim", 2,
        "--v-head-dim", 5, "--rope-interleaved", "--attention-bias", "none", "--moe-router-score-function", "sigmoid",
        "--moe-router-enable-expert-bias", "--moe-router-dtype", "fp32", "--mtp-layers", 1, "--mtp-loss-weight", 0.3,
        "--moe-shared-expert-intermediate-size", 6,
    ),
}  # fmt: skip
