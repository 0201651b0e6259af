"""Name gpt-oss in both sizes."""

from typing import Any

from fairseq_moe.models.presets.preset import Preset, experts, sizes

__all__ = ["GPT_OSS_PRESETS"]


def _gpt_oss(layers: int, num_experts: int) -> dict[str, Any]:
    return {
        **sizes(layers, 2880, 64, 2880, 2880),
        **experts(num_experts, 4, aux=1e-3),
        "moe_router_bias": True,
        "decoder_kv_heads": 8,
        "decoder_head_dim": 64,
        "attention_bias": "all",
        "attention_sinks": True,
        "attention_window": 128,
        "attention_window_layers": f"([1,0]*{layers // 2})",
        "gated_ffn_bias": True,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 32.0,
        "rope_original_max_positions": 4096,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "rope_untruncated": True,
        "init_std": 0.02,
    }


GPT_OSS_PRESETS: dict[str, Preset] = {
    "gpt_oss_20b": Preset(
        title="gpt-oss-20b",
        vocab_size=201_088,
        num_parameters=20_914_757_184,
        flags=_gpt_oss(24, 32),
    ),
    "gpt_oss_120b": Preset(
        title="gpt-oss-120b",
        vocab_size=201_088,
        num_parameters=116_829_156_672,
        flags=_gpt_oss(36, 128),
    ),
}
