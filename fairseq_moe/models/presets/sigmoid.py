"""Name published models that route as DeepSeek-V3 does: sigmoid scores, and a bias per expert that moves choices."""

from typing import Any

from fairseq_moe.models.presets.preset import Preset, deepseek_blocks, experts, sizes

__all__ = ["SIGMOID_PRESETS"]

_SEQUENCE: dict[str, Any] = {"moe_router_load_balancing_type": "seq_aux_loss"}


def _routed(count: int, top_k: int, *, aux: float = 0.0, scaling: float | None = None) -> dict[str, Any]:
    """Share the routing; a coefficient of 0 leaves balancing to the bias."""
    scaled = {} if scaling is None else {"moe_router_topk_scaling_factor": scaling}
    return {
        **experts(count, top_k, aux=aux),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
        "moe_router_dtype": "fp32",
        "init_std": 0.02,
        **scaled,
    }


_GLM: dict[str, Any] = {
    **_SEQUENCE, "attention_bias": "qkv", "decoder_head_dim": 128, "decoder_kv_heads": 8, "norm_eps": 1e-5,
    "rope_theta": 1e6, "rotary_fraction": 0.5,
}  # fmt: skip

SIGMOID_PRESETS: dict[str, Preset] = {
    "glm_4_5": Preset(
        title="GLM-4.5",
        vocab_size=151_552,
        num_parameters=352_797_814_784,
        num_dense_layers=3,
        flags={
            **sizes(92, 5120, 96, 12288, 1536),
            **_routed(160, 8, aux=1e-4, scaling=2.5),
            **_GLM,
            "qk_norm": "head",
            "moe_shared_expert_intermediate_size": 1536,
        },
    ),
    "glm_4_5_air": Preset(
        title="GLM-4.5-Air",
        vocab_size=151_552,
        num_parameters=106_852_245_504,
        num_dense_layers=1,
        flags={
            **sizes(46, 4096, 96, 10944, 1408),
            **_routed(128, 8, aux=1e-4),
            **_GLM,
            "moe_shared_expert_intermediate_size": 1408,
        },
    ),
    "glm_4_7_flash": Preset(
        title="GLM-4.7-Flash",
        vocab_size=154_880,
        num_parameters=29_943_390_976,
        num_dense_layers=1,
        flags={
            **sizes(47, 2048, 20, 10240, 1536),
            **_routed(64, 4, aux=1e-4, scaling=1.8),
            **_SEQUENCE,
            "moe_shared_expert_intermediate_size": 1536,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "norm_eps": 1e-5,
            "rope_interleaved": True,
            "rope_theta": 1e6,
        },
    ),
    "dots_llm1": Preset(
        title="dots.llm1",
        vocab_size=152_064,
        num_parameters=142_774_373_888,
        num_dense_layers=1,
        flags={
            **sizes(62, 4096, 32, 10944, 1408),
            **_routed(128, 6, scaling=2.5),
            "decoder_head_dim": 128,
            "decoder_kv_heads": 32,
            "moe_shared_expert_intermediate_size": 2816,
            "norm_eps": 1e-5,
            "qk_norm": "head",
            "rope_theta": 1e7,
        },
    ),
    "minimax_m2": Preset(
        title="MiniMax-M2",
        vocab_size=200_064,
        num_parameters=228_689_748_992,
        flags={
            **sizes(62, 3072, 48, 1536, 1536),
            **_routed(256, 8),
            "decoder_head_dim": 128,
            "decoder_kv_heads": 8,
            "qk_norm": "full",
            "rope_theta": 5e6,
            "rotary_fraction": 0.5,
        },
    ),
    "kimi_k2": Preset(
        title="Kimi-K2",
        vocab_size=163_840,
        num_parameters=1_026_408_209_408,
        num_dense_layers=1,
        flags={
            **sizes(61, 7168, 64, 18432, 2048),
            **deepseek_blocks(q_lora_rank=1536, mscale=1.0, shared_ffn=2048),
            **_routed(384, 8, scaling=2.827),
            "rope_beta_fast": 1.0,
            "rope_scaling_factor": 32.0,
            "rope_theta": 5e4,
        },
    ),
}
