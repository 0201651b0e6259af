"""Name models of families that need small blocks of their own: Granite, Hunyuan and ERNIE."""

from typing import Any

from fairseq_moe.models.presets.preset import Preset

__all__ = ["SMALL_PRESETS"]

_GRANITE: dict[str, Any] = {
    "decoder_ffn_embed_dim": 512,
    "moe_ffn_hidden_size": 512,
    "decoder_kv_heads": 8,
    "share_decoder_input_output_embed": True,
    "rope_theta": 1e4,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 6.0,
    "moe_router_topk": 8,
    "moe_aux_loss_coeff": "0.001",
    "init_std": 0.02,
}
_ERNIE: dict[str, Any] = {
    "norm_eps": 1e-5,
    "share_decoder_input_output_embed": True,
    "rope_theta": 5e5,
    "rope_interleaved": True,
    "num_experts": 64,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_dtype": "fp32",
    "moe_aux_loss_coeff": "0.001",
    "init_std": 0.02,
}

SMALL_PRESETS: dict[str, Preset] = {
    "granite_1b_a400m": Preset(
        title="Granite-3.0-1B-A400M",
        vocab_size=49_155,
        num_parameters=1_334_628_352,
        flags={
            **_GRANITE,
            "decoder_layers": 24,
            "decoder_embed_dim": 1024,
            "decoder_attention_heads": 16,
            "num_experts": 32,
        },
    ),
    "granite_3b_a800m": Preset(
        title="Granite-3.0-3B-A800M",
        vocab_size=49_155,
        num_parameters=3_298_793_472,
        flags={
            **_GRANITE,
            "decoder_layers": 32,
            "decoder_embed_dim": 1536,
            "decoder_attention_heads": 24,
            "num_experts": 40,
        },
    ),
    "hunyuan_a13b": Preset(
        title="Hunyuan-A13B",
        vocab_size=128_167,
        num_parameters=80_393_183_232,
        flags={
            "decoder_layers": 32,
            "decoder_embed_dim": 4096,
            "decoder_attention_heads": 32,
            "decoder_kv_heads": 8,
            "decoder_head_dim": 128,
            "decoder_ffn_embed_dim": 3072,
            "share_decoder_input_output_embed": True,
            "norm_eps": 1e-5,
            "qk_norm": "head",
            "qk_norm_after_rope": True,
            "rope_theta": 1e4 * 1000.0 ** (128 / 126),  # stretched by alpha 1000, once and for all
            "num_experts": 64,
            "moe_router_topk": 8,
            "moe_router_dtype": "fp32",
            "moe_ffn_hidden_size": 3072,
            "moe_shared_expert_intermediate_size": 3072,
            "moe_aux_loss_coeff": "0.001",
            "init_std": 0.02,
        },
    ),
    "ernie_45_21b_a3b": Preset(
        title="ERNIE-4.5-21B-A3B",
        vocab_size=103_424,
        num_parameters=21_825_436_160,
        num_dense_layers=1,
        flags={
            **_ERNIE,
            "decoder_layers": 28,
            "decoder_embed_dim": 2560,
            "decoder_attention_heads": 20,
            "decoder_kv_heads": 4,
            "decoder_ffn_embed_dim": 12288,
            "moe_ffn_hidden_size": 1536,
            "moe_router_topk": 6,
            "moe_shared_expert_intermediate_size": 3072,
        },
    ),
    "ernie_45_300b_a47b": Preset(
        title="ERNIE-4.5-300B-A47B",
        vocab_size=103_424,
        num_parameters=298_636_910_592,
        num_dense_layers=3,
        flags={
            **_ERNIE,
            "decoder_layers": 54,
            "decoder_embed_dim": 8192,
            "decoder_attention_heads": 64,
            "decoder_kv_heads": 8,
            "decoder_ffn_embed_dim": 28672,
            "moe_ffn_hidden_size": 3584,
            "moe_router_topk": 8,
        },
    ),
}
