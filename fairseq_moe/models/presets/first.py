"""Name the first published mixture-of-experts models: Mixtral, DeepSeek-V2 and V3, Qwen2, OLMoE, Qwen3."""

from typing import Any

from fairseq_moe.models.presets.preset import Preset, deepseek_blocks, experts, sizes

__all__ = ["FIRST_PRESETS"]

_MIXTRAL: dict[str, Any] = {"norm_eps": 1e-5, "decoder_kv_heads": 8}
_QWEN3: dict[str, Any] = {
    "rope_theta": 1e6, "qk_norm": "head", "decoder_head_dim": 128, "decoder_kv_heads": 4, "init_std": 0.02,
}  # fmt: skip


FIRST_PRESETS: dict[str, Preset] = {
    "mixtral_8x2b": Preset(
        title="Mixtral-8x2B",
        vocab_size=32_000,
        num_parameters=6_850_840_576,
        flags={
            **sizes(24, 2048, 16, 5440, 5440),
            **experts(8, 2, aux=1e-2),
            **_MIXTRAL,
            "rope_theta": 1e4,
            "rotary_fraction": 0.5,
            "init_std": 0.014,
        },
    ),
    "mixtral_8x7b": Preset(
        title="Mixtral-8x7B",
        vocab_size=32_000,
        num_parameters=46_702_792_704,
        flags={
            **sizes(32, 4096, 32, 14336, 14336),
            **experts(8, 2, aux=1e-2),
            **_MIXTRAL,
            "rope_theta": 1e6,
            "init_std": 0.008,
        },
    ),
    "mixtral_8x22b": Preset(
        title="Mixtral-8x22B",
        vocab_size=32_768,
        num_parameters=140_630_071_296,
        flags={
            **sizes(56, 6144, 48, 16384, 16384),
            **experts(8, 2, aux=1e-2),
            **_MIXTRAL,
            "rope_theta": 1e6,
            "init_std": 0.008,
        },
    ),
    "deepseek_v2": Preset(
        title="DeepSeek-V2",
        vocab_size=102_400,
        num_parameters=235_741_434_880,
        num_dense_layers=1,
        flags={
            **sizes(60, 5120, 128, 12288, 1536),
            **experts(160, 6, aux=1e-3),
            **deepseek_blocks(q_lora_rank=1536, mscale=0.707, shared_ffn=3072),
            "moe_router_pre_softmax": True,
            "moe_router_num_groups": 8,
            "moe_router_group_topk": 3,
            "moe_router_group_score": "max",
            "moe_router_topk_scaling_factor": 16.0,
        },
    ),
    "deepseek_v2_lite": Preset(
        title="DeepSeek-V2-Lite",
        vocab_size=102_400,
        num_parameters=15_706_484_224,
        num_dense_layers=1,
        flags={
            **sizes(27, 2048, 16, 10944, 1408),
            **experts(64, 6, aux=1e-3),
            **deepseek_blocks(q_lora_rank=None, mscale=0.707, shared_ffn=2816),
            "moe_router_pre_softmax": True,
        },
    ),
    "deepseek_v3": Preset(
        title="DeepSeek-V3",
        vocab_size=129_280,
        num_parameters=671_026_404_352,
        num_dense_layers=3,
        flags={
            **sizes(61, 7168, 128, 18432, 2048),
            **experts(256, 8, aux=1e-4),
            **deepseek_blocks(q_lora_rank=1536, mscale=1.0, shared_ffn=2048),
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 1e-3,
            "moe_router_num_groups": 8,
            "moe_router_group_topk": 4,
            "moe_router_group_score": "best_two",
            "moe_router_topk_scaling_factor": 2.5,
        },
    ),
    "qwen2_57b_a14b": Preset(
        title="Qwen2-57B-A14B",
        vocab_size=151_936,
        num_parameters=57_408_658_944,
        flags={
            **sizes(28, 3584, 28, 18944, 2560),
            **experts(64, 8, aux=1e-2),
            "decoder_kv_heads": 4,
            "attention_bias": "qkv",
            "rope_theta": 1e6,
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": 20480,
            "moe_shared_expert_gate": True,
            "init_std": 0.008,
        },
    ),
    "olmoe_1b_7b": Preset(
        title="OLMoE-1B-7B",
        vocab_size=50_304,
        num_parameters=6_919_161_856,
        flags={
            **sizes(16, 2048, 16, 1024, 1024),
            **experts(64, 8, aux=1e-2),
            "moe_z_loss_coeff": 1e-3,
            "moe_router_pre_softmax": True,
            "norm_eps": 1e-5,
            "qk_norm": "full",
            "rope_theta": 1e4,
            "init_std": 0.02,
        },
    ),
    "qwen3_30b_a3b": Preset(
        title="Qwen3-30B-A3B",
        vocab_size=151_936,
        num_parameters=30_532_122_624,
        flags={**sizes(48, 2048, 32, 6144, 768), **experts(128, 8, aux=1e-3), **_QWEN3},
    ),
    "qwen3_235b_a22b": Preset(
        title="Qwen3-235B-A22B",
        vocab_size=151_936,
        num_parameters=235_093_634_560,
        flags={**sizes(94, 4096, 64, 12288, 1536), **experts(128, 8, aux=1e-3), **_QWEN3},
    ),
}
