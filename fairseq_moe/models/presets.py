"""Name published mixture-of-experts models as architectures: ``--arch mixtral_8x7b``, for hydra ``model=mixtral_8x7b``.

Sizes and rules are those of the published checkpoints, coefficients and initial deviations those of Megatron's
recipes. Any flag given by hand counts instead. The vocabulary is the dictionary's.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fairseq.models import ARCH_MODEL_REGISTRY, register_model_architecture
from fairseq.models.transformer_lm import base_lm_architecture

from fairseq_moe.models.small_presets import SMALL_PRESETS

__all__ = ["PRESETS", "Preset", "register_presets"]

_COMMON: dict[str, Any] = {
    "decoder_normalization": "rmsnorm",
    "position_embedding": "rope",
    "gated_ffn": True,
    "attention_bias": "none",
    "no_scale_embedding": True,
    "dropout": 0.0,
    "norm_eps": 1e-6,
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Describe one published model.

    Args:
        title: its published name.
        vocab_size: V, with which its parameters were counted.
        num_parameters: of the whole model.
        num_dense_layers: first layers without experts.
        flags: model flags by field name, besides those of ``_COMMON``.
    """

    title: str
    vocab_size: int
    num_parameters: int
    num_dense_layers: int = 0
    flags: dict[str, Any] = field(default_factory=dict)

    def apply(self, args: Namespace) -> None:
        """Fill in the flags that were not given."""
        for name, value in (_COMMON | self.flags).items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        if getattr(args, "moe_layer_freq", None) is None:
            num_moe_layers = args.decoder_layers - self.num_dense_layers
            args.moe_layer_freq = f"([0]*{self.num_dense_layers}+[1]*{num_moe_layers})"

    def apply_to_command(self, args: Namespace) -> None:
        """Do what --arch does: fill in this model's values, then fairseq's own."""
        self.apply(args)
        base_lm_architecture(args)

    def values(self) -> dict[str, Any]:
        """Collect the flags of the model that are not fairseq's defaults."""
        args = Namespace(decoder_normalize_before=True)
        self.apply(args)
        width = args.decoder_embed_dim
        return {**vars(args), "decoder_input_dim": width, "decoder_output_dim": width}


def _sizes(layers: int, dim: int, heads: int, ffn: int, expert_ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": dim,
        "decoder_attention_heads": heads,
        "decoder_ffn_embed_dim": ffn,
        "moe_ffn_hidden_size": expert_ffn,
        **more,
    }


def _experts(count: int, top_k: int, *, aux: float, **more: Any) -> dict[str, Any]:
    return {"num_experts": count, "moe_router_topk": top_k, "moe_aux_loss_coeff": str(aux), **more}


def _deepseek(*, q_lora_rank: int | None, mscale: float, shared_ffn: int) -> dict[str, Any]:
    """Share DeepSeek's latent attention, stretched positions, router in float32 and loss per sequence."""
    return {
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleaved": True,
        "rope_theta": 1e4,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 40.0,
        "rope_original_max_positions": 4096,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "rope_mscale": mscale,
        "rope_mscale_all_dim": mscale,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_shared_expert_intermediate_size": shared_ffn,
        "init_std": 0.02,
    }


_MIXTRAL: dict[str, Any] = {"norm_eps": 1e-5, "decoder_kv_heads": 8}
_QWEN3: dict[str, Any] = {
    "rope_theta": 1e6, "qk_norm": "head", "decoder_head_dim": 128, "decoder_kv_heads": 4, "init_std": 0.02,
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    "mixtral_8x2b": Preset(
        title="Mixtral-8x2B",
        vocab_size=32_000,
        num_parameters=6_850_840_576,
        flags={
            **_sizes(24, 2048, 16, 5440, 5440),
            **_experts(8, 2, aux=1e-2),
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
            **_sizes(32, 4096, 32, 14336, 14336),
            **_experts(8, 2, aux=1e-2),
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
            **_sizes(56, 6144, 48, 16384, 16384),
            **_experts(8, 2, aux=1e-2),
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
            **_sizes(60, 5120, 128, 12288, 1536),
            **_experts(160, 6, aux=1e-3),
            **_deepseek(q_lora_rank=1536, mscale=0.707, shared_ffn=3072),
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
            **_sizes(27, 2048, 16, 10944, 1408),
            **_experts(64, 6, aux=1e-3),
            **_deepseek(q_lora_rank=None, mscale=0.707, shared_ffn=2816),
            "moe_router_pre_softmax": True,
        },
    ),
    "deepseek_v3": Preset(
        title="DeepSeek-V3",
        vocab_size=129_280,
        num_parameters=671_026_404_352,
        num_dense_layers=3,
        flags={
            **_sizes(61, 7168, 128, 18432, 2048),
            **_experts(256, 8, aux=1e-4),
            **_deepseek(q_lora_rank=1536, mscale=1.0, shared_ffn=2048),
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
            **_sizes(28, 3584, 28, 18944, 2560),
            **_experts(64, 8, aux=1e-2),
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
            **_sizes(16, 2048, 16, 1024, 1024),
            **_experts(64, 8, aux=1e-2),
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
        flags={**_sizes(48, 2048, 32, 6144, 768), **_experts(128, 8, aux=1e-3), **_QWEN3},
    ),
    "qwen3_235b_a22b": Preset(
        title="Qwen3-235B-A22B",
        vocab_size=151_936,
        num_parameters=235_093_634_560,
        flags={**_sizes(94, 4096, 64, 12288, 1536), **_experts(128, 8, aux=1e-3), **_QWEN3},
    ),
}

PRESETS |= {name: Preset(**values) for name, values in SMALL_PRESETS.items()}


def register_presets(store: Callable[[str, dict[str, Any]], None]) -> None:
    """Register every preset as an architecture of ``transformer_lm``.

    Args:
        store: also told the name of each and its flags, for hydra.
    """
    for name, preset in PRESETS.items():
        if name not in ARCH_MODEL_REGISTRY:  # the package may be imported again
            register_model_architecture("transformer_lm", name)(preset.apply_to_command)
        store(name, preset.values())
