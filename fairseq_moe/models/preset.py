"""Describe one published model as an architecture, and write down what the flags of several have in common."""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from fairseq.models.transformer_lm import base_lm_architecture

__all__ = ["Preset", "deepseek_blocks", "experts", "sizes"]

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


def sizes(layers: int, dim: int, heads: int, ffn: int, expert_ffn: int, **more: Any) -> dict[str, Any]:
    """Write the flags of layers, model width, query heads, and widths of dense networks and experts."""
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": dim,
        "decoder_attention_heads": heads,
        "decoder_ffn_embed_dim": ffn,
        "moe_ffn_hidden_size": expert_ffn,
        **more,
    }


def experts(count: int, top_k: int, *, aux: float, **more: Any) -> dict[str, Any]:
    """Write the flags of so many experts, of which each token takes ``top_k``, balanced with the weight ``aux``."""
    return {"num_experts": count, "moe_router_topk": top_k, "moe_aux_loss_coeff": str(aux), **more}


def deepseek_blocks(*, q_lora_rank: int | None, mscale: float, shared_ffn: int) -> dict[str, Any]:
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
