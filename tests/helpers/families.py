"""Build tiny models of every published family: transformers' configuration, our flags, and the same weights in both."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.helpers.presets import WordIds, build_model, parse

__all__ = ["FAMILIES", "Family", "build_pair", "our_state"]

VOCABULARY = 61
_GQA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
_GQA_FLAGS = (
    "--decoder-layers 3 --decoder-embed-dim 32 --decoder-attention-heads 4 --decoder-kv-heads 2 "
    "--num-experts 8 --moe-ffn-hidden-size 20 --decoder-ffn-embed-dim 24"
)
_GRANITE = {
    **_GQA,
    "intermediate_size": 20,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.5,
    "logits_scaling": 1.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_GRANITE_FLAGS = (
    " --moe-router-topk 4 --embedding-multiplier 3 --residual-multiplier 0.7 --attention-multiplier 0.5 "
    "--logits-scaling 1.5"
)
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
_MLA = {
    **_GQA,
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
_MLA_FLAGS = (
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


FAMILIES = {
    "mixtral": Family(
        kind="Mixtral",
        config={
            **_GQA,
            "intermediate_size": 20,
            "num_local_experts": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        arch="mixtral_8x7b",
        flags=_GQA_FLAGS,
    ),
    "deepseek_v2": Family(
        kind="DeepseekV2",
        config={
            **_MLA,
            "q_lora_rank": 16,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        arch="deepseek_v2",
        flags=_MLA_FLAGS + " --q-lora-rank 16 --moe-router-num-groups 4 --moe-router-group-topk 2",
        moe_layers=(1, 2, 3),
    ),
    "deepseek_v2_lite": Family(
        kind="DeepseekV2",
        config={
            **_MLA,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        arch="deepseek_v2_lite",
        flags=_MLA_FLAGS,
        moe_layers=(1, 2, 3),
    ),
    "deepseek_v3": Family(
        kind="DeepseekV3",
        config={
            **_MLA,
            "q_lora_rank": 16,
            "first_k_dense_replace": 2,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        arch="deepseek_v3",
        flags=_MLA_FLAGS
        + " --q-lora-rank 16 --moe-router-num-groups 4 --moe-router-group-topk 2"
        + " --moe-layer-freq ([0]*2+[1]*2)",
        moe_layers=(2, 3),
    ),
    "qwen2": Family(
        kind="Qwen2Moe",
        config={
            **_GQA,
            "intermediate_size": 24,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        arch="qwen2_57b_a14b",
        flags=_GQA_FLAGS
        + " --moe-router-topk 4 --moe-shared-expert-intermediate-size 40 --moe-layer-freq [1,0,1]",
        moe_layers=(0, 2),
    ),
    "olmoe": Family(
        kind="Olmoe",
        config={
            **_GQA,
            "num_key_value_heads": 4,
            "intermediate_size": 20,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "clip_qkv": 1.54,  # no value of this seed is nearer to it than 2e-4: a clipped one has no gradient
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        arch="olmoe_1b_7b",
        flags=_GQA_FLAGS + " --decoder-kv-heads 4 --moe-router-topk 4 --clip-qkv 1.54",
    ),
    "qwen3": Family(
        kind="Qwen3Moe",
        config={
            **_GQA,
            "head_dim": 12,
            "intermediate_size": 24,
            "moe_intermediate_size": 20,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        arch="qwen3_30b_a3b",
        flags=_GQA_FLAGS + " --moe-router-topk 4 --decoder-head-dim 12 --moe-layer-freq [0,1,0]",
        moe_layers=(1,),
    ),
    "granite": Family(
        kind="GraniteMoe",
        config={**_GRANITE, "tie_word_embeddings": True},
        arch="granite_1b_a400m",
        flags=_GQA_FLAGS + _GRANITE_FLAGS,
    ),
    "granite_shared": Family(
        kind="GraniteMoeShared",
        config={**_GRANITE, "tie_word_embeddings": True, "shared_intermediate_size": 12},
        arch="granite_1b_a400m",
        flags=_GQA_FLAGS + _GRANITE_FLAGS + " --moe-shared-expert-intermediate-size 12",
    ),
    "hunyuan": Family(
        kind="HunYuanMoEV1",
        config={
            **_GQA,
            "head_dim": 12,
            "intermediate_size": 20,
            "num_experts": 8,
            "moe_topk": 4,
            "pad_token_id": None,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1e3, "factor": 1.0},
        },
        arch="hunyuan_a13b",
        flags=_GQA_FLAGS
        + " --moe-router-topk 4 --decoder-head-dim 12 --moe-shared-expert-intermediate-size 20"
        + f" --rope-theta {1e4 * 1e3 ** (12 / 10)!r}",
    ),
    "ernie": Family(
        kind="Ernie4_5_Moe",
        config={
            **_GQA,
            "intermediate_size": 24,
            "moe_intermediate_size": 20,
            "moe_num_experts": 8,
            "moe_k": 4,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 2,
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        arch="ernie_45_21b_a3b",
        flags=_GQA_FLAGS + " --moe-router-topk 4 --moe-shared-expert-intermediate-size 40",
        moe_layers=(1, 2),
    ),
}


def build_pair(name: str, more_flags: str = "") -> tuple[Any, Any]:
    """Build transformers' model with random weights, norms and biases included, and ours with the same.

    Args:
        name: of the family.
        more_flags: of ours.
    """
    family = FAMILIES[name]
    config = getattr(transformers, f"{family.kind}Config")(**family.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    theirs = getattr(transformers, f"{family.kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            is_small = value.dim() == 1 and "bias" not in key
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3 + (1.0 if is_small else 0.0))
    args = parse(family.arch, (family.flags + " " + more_flags).split(), max_positions=64)
    ours = build_model(args, WordIds(VOCABULARY)).eval()
    state = our_state(theirs.state_dict(), tied=config.tie_word_embeddings)
    missing, surplus = ours.load_state_dict(state, strict=False)
    assert not surplus and all(key.startswith("decoder.mtp.") for key in missing), (missing, surplus)
    return theirs, ours


_PARTS = {
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn.q_a_layernorm": "self_attn.q_a_norm",
    "self_attn.kv_a_layernorm": "self_attn.kv_a_norm",
    "self_attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj",
    "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.experts.gate_up_proj": "moe_layer.experts.fc1_weight",
    "mlp.experts.down_proj": "moe_layer.experts.fc2_weight",
    "mlp.gate.weight": "moe_layer.router.weight",
    "mlp.gate.e_score_correction_bias": "moe_layer.router.expert_bias",
    "mlp.gate.wg.weight": "moe_layer.router.weight",
    "mlp.gate.moe_statics.e_score_correction_bias": "moe_layer.router.expert_bias",
    "mlp.shared_mlp": "moe_layer.shared_experts",
    "block_sparse_moe.experts.gate_up_proj": "moe_layer.experts.fc1_weight",
    "block_sparse_moe.experts.down_proj": "moe_layer.experts.fc2_weight",
    "block_sparse_moe.router": "moe_layer.router",
    "shared_mlp.input_linear": "moe_layer.shared_experts.fc1",
    "shared_mlp.output_linear": "moe_layer.shared_experts.fc2",
    "query_layernorm": "q_norm",
    "key_layernorm": "k_norm",
    "mlp.shared_expert_gate": "moe_layer.shared_experts.gate",
    "mlp.shared_experts": "moe_layer.shared_experts",
    "mlp.shared_expert": "moe_layer.shared_experts",
    "model.norm": "decoder.layer_norm",
    "model.embed_tokens": "decoder.embed_tokens",
    "lm_head": "decoder.output_projection",
    "model.layers": "decoder.layers",
    "down_proj": "fc2",
    "mlp.": "",
}


def our_state(state: dict[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Convert transformers' tensors (or their gradients) to our names: gate rows, then up rows, in one matrix."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("up_proj.weight"):
            continue
        if key.endswith("gate_proj.weight"):
            value = torch.cat([value, state[key.replace("gate_proj", "up_proj")]])
        name = key.replace("gate_proj", "fc1")
        for old, new in _PARTS.items():
            name = name.replace(old, new)
        found[name] = value.squeeze(0) if name.endswith("expert_bias") else value
    if tied:
        found.pop("decoder.output_projection.weight", None)
    return found
