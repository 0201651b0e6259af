"""List tiny models of families of 2025: those that route as DeepSeek-V3 does, Granite, Hunyuan and ERNIE."""

from tests.helpers.family_kinds import GQA, GQA_FLAGS, MLA, MLA_FLAGS, YARN, Family

__all__ = ["NEWER_FAMILIES"]

_SIGMOID = {
    **GQA,
    "head_dim": 12,
    "intermediate_size": 24,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_SIGMOID_FLAGS = (
    GQA_FLAGS + " --decoder-head-dim 12 --moe-router-topk 3 --moe-shared-expert-intermediate-size 20"
)


_GRANITE = {
    **GQA,
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

NEWER_FAMILIES = {
    "glm": Family(
        kind="Glm4Moe",
        config={**_SIGMOID, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 2.5},
        arch="glm_4_5",
        flags=_SIGMOID_FLAGS + " --moe-layer-freq [0,1,1]",
        moe_layers=(1, 2),
    ),
    "glm_lite": Family(
        kind="Glm4MoeLite",
        config={
            **MLA,
            "q_lora_rank": 16,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        arch="glm_4_7_flash",
        flags=MLA_FLAGS.replace("--rope-original-max-positions 16 ", "") + " --q-lora-rank 16",
        moe_layers=(1, 2, 3),
    ),
    "dots": Family(
        kind="Dots1",
        config={
            **_SIGMOID,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
        },
        arch="dots_llm1",
        flags=_SIGMOID_FLAGS + " --moe-shared-expert-intermediate-size 40",
        moe_layers=(1, 2),
    ),
    "minimax": Family(
        kind="MiniMaxM2",
        config={
            **GQA,
            "head_dim": 12,
            "intermediate_size": 20,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rotary_dim": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
        },
        arch="minimax_m2",
        flags=GQA_FLAGS + " --decoder-head-dim 12 --moe-router-topk 3",
    ),
    "kimi": Family(
        kind="DeepseekV3",
        config={
            **MLA,
            "q_lora_rank": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.827,
            "rope_parameters": {
                **YARN,
                "rope_theta": 50000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 640,  # where a larger beta_fast would begin a pair earlier
                "beta_fast": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        arch="kimi_k2",
        flags=MLA_FLAGS + " --q-lora-rank 16 --rope-original-max-positions 640",
        moe_layers=(1, 2, 3),
    ),
    "granite": Family(
        kind="GraniteMoe",
        config={**_GRANITE, "tie_word_embeddings": True},
        arch="granite_1b_a400m",
        flags=GQA_FLAGS + _GRANITE_FLAGS,
    ),
    "granite_shared": Family(
        kind="GraniteMoeShared",
        config={**_GRANITE, "tie_word_embeddings": True, "shared_intermediate_size": 12},
        arch="granite_1b_a400m",
        flags=GQA_FLAGS + _GRANITE_FLAGS + " --moe-shared-expert-intermediate-size 12",
    ),
    "hunyuan": Family(
        kind="HunYuanMoEV1",
        config={
            **GQA,
            "head_dim": 12,
            "intermediate_size": 20,
            "num_experts": 8,
            "moe_topk": 4,
            "pad_token_id": None,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1e3, "factor": 1.0},
        },
        arch="hunyuan_a13b",
        flags=GQA_FLAGS
        + " --moe-router-topk 4 --decoder-head-dim 12 --moe-shared-expert-intermediate-size 20"
        + f" --rope-theta {1e4 * 1e3 ** (12 / 10)!r}",
    ),
    "ernie": Family(
        kind="Ernie4_5_Moe",
        config={
            **GQA,
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
        flags=GQA_FLAGS + " --moe-router-topk 4 --moe-shared-expert-intermediate-size 40",
        moe_layers=(1, 2),
    ),
}
