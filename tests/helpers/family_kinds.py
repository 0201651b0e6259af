"""Describe a tiny model of a family, and what those of several families have in common."""

from dataclasses import dataclass
from typing import Any

__all__ = ["GQA", "GQA_FLAGS", "MLA", "MLA_FLAGS", "VOCABULARY", "YARN", "Family"]

VOCABULARY = 61
GQA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
GQA_FLAGS = (
    "--decoder-layers 3 --decoder-embed-dim 32 --decoder-attention-heads 4 --decoder-kv-heads 2 "
    "--num-experts 8 --moe-ffn-hidden-size 20 --decoder-ffn-embed-dim 24"
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
MLA = {
    **GQA,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
    "moe_intermediate_size": 20,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 640,
}
MLA_FLAGS = (
    "--decoder-layers 4 --decoder-embed-dim 32 --decoder-attention-heads 4 --num-experts 16 "
    "--moe-router-topk 4 --moe-ffn-hidden-size 20 --decoder-ffn-embed-dim 24 --kv-lora-rank 20 "
    "--qk-nope-head-dim 12 --qk-rope-head-dim 8 --v-head-dim 10 --rope-original-max-positions 16 "
    "--moe-shared-expert-intermediate-size 40"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published family as tests build it: transformers' configuration and our flags.

    Args:
        kind: prefix of transformers' classes.
        config: arguments of its configuration.
        arch: our preset.
        flags: what makes it tiny.
        moe_layers: which layers have experts.
    """

    kind: str
    config: dict[str, Any]
    arch: str
    flags: str
    moe_layers: tuple[int, ...] = (0, 1, 2)
