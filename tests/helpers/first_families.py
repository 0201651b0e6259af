"""List tiny models of the families up to Qwen3, and of gpt-oss; windows among them."""

from tests.helpers.family_kinds import GQA, GQA_FLAGS, MLA, MLA_FLAGS, YARN, Family

__all__ = ["FIRST_FAMILIES"]

FIRST_FAMILIES = {
    "mixtral_window": Family(
        kind="Mixtral",
        config={
            **GQA,
            "intermediate_size": 20,
            "num_local_experts": 8,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        arch="mixtral_8x7b",
        flags=GQA_FLAGS + " --attention-window 5",
    ),
    "qwen2_window": Family(
        kind="Qwen2Moe",
        config={
            **GQA,
            "intermediate_size": 24,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        arch="qwen2_57b_a14b",
        flags=GQA_FLAGS + " --moe-router-topk 4 --moe-shared-expert-intermediate-size 40"
        " --attention-window 7 --attention-window-layers [1,0,0]",
    ),
    "gpt_oss": Family(
        kind="GptOss",
        config={
            **GQA,
            "head_dim": 12,
            "intermediate_size": 20,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "sliding_window": 6,
            "swiglu_limit": 1.5,
            "rope_parameters": {**YARN, "factor": 8.0, "beta_slow": 0.25, "truncate": False},
        },
        arch="gpt_oss_20b",
        flags=GQA_FLAGS + " --decoder-head-dim 12 --moe-router-topk 4 --attention-window 6"
        " --attention-window-layers [1,0,1] --swiglu-limit 1.5 --rope-theta 10000 --rope-scaling-factor 8"
        " --rope-original-max-positions 16 --rope-beta-slow 0.25",
    ),
    "mixtral": Family(
        kind="Mixtral",
        config={
            **GQA,
            "intermediate_size": 20,
            "num_local_experts": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        arch="mixtral_8x7b",
        flags=GQA_FLAGS,
    ),
    "deepseek_v2": Family(
        kind="DeepseekV2",
        config={
            **MLA,
            "q_lora_rank": 16,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        arch="deepseek_v2",
        flags=MLA_FLAGS + " --q-lora-rank 16 --moe-router-num-groups 4 --moe-router-group-topk 2",
        moe_layers=(1, 2, 3),
    ),
    "deepseek_v2_lite": Family(
        kind="DeepseekV2",
        config={
            **MLA,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        arch="deepseek_v2_lite",
        flags=MLA_FLAGS,
        moe_layers=(1, 2, 3),
    ),
    "deepseek_v3": Family(
        kind="DeepseekV3",
        config={
            **MLA,
            "q_lora_rank": 16,
            "first_k_dense_replace": 2,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        arch="deepseek_v3",
        flags=MLA_FLAGS
        + " --q-lora-rank 16 --moe-router-num-groups 4 --moe-router-group-topk 2"
        + " --moe-layer-freq ([0]*2+[1]*2)",
        moe_layers=(2, 3),
    ),
    "qwen2": Family(
        kind="Qwen2Moe",
        config={
            **GQA,
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
        flags=GQA_FLAGS
        + " --moe-router-topk 4 --moe-shared-expert-intermediate-size 40 --moe-layer-freq [1,0,1]",
        moe_layers=(0, 2),
    ),
    "olmoe": Family(
        kind="Olmoe",
        config={
            **GQA,
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
        flags=GQA_FLAGS + " --decoder-kv-heads 4 --moe-router-topk 4 --clip-qkv 1.54",
    ),
    "qwen3": Family(
        kind="Qwen3Moe",
        config={
            **GQA,
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
        flags=GQA_FLAGS + " --moe-router-topk 4 --decoder-head-dim 12 --moe-layer-freq [0,1,0]",
        moe_layers=(1,),
    ),
}
