"""Make tiny models of every family with transformers: vocabulary 97, random weights far from their start values.

Their ids 0..3 are ordinary tokens, the original context is short, so that YaRN's stretched positions occur, and sizes
are unequal, so that a mistaken transposition or order shows.
"""

import copy
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = [
    "HF_MODELS",
    "add_prediction_block",
    "build_hf_model",
    "hf_config",
    "import_transformers",
    "mean_loss_bits",
    "random_model",
]

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
}
_SIGMOID = {
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    **_ROPE,
}
_MLA = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.5,
    "logits_scaling": 1.5,
}
# name -> (class of the configuration, its arguments)
HF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        {"num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 4, **_ROPE},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_MLA,
            **_YARN,
            "q_lora_rank": 20,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2Config",
        {
            **_MLA,
            **_YARN,
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_MLA,
            **_YARN,
            "q_lora_rank": 20,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
            **_ROPE,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.5,
            **_ROPE,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "intermediate_size": 20,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "swiglu_limit": 1.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1.5e5,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 0.25,
                "truncate": False,
            },
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "intermediate_size": 40,
            "moe_intermediate_size": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            **_ROPE,
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 12,
            "num_local_experts": 4,
            **_MULTIPLIERS,
            **_ROPE,
        },
    ),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 12,
            "num_local_experts": 4,
            "shared_intermediate_size": 20,
            "tie_word_embeddings": True,
            **_MULTIPLIERS,
            **_ROPE,
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "intermediate_size": 12,
            "num_experts": 4,
            "moe_topk": [2, 2, 2],
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1e3, "factor": 1.0},
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "moe_intermediate_size": 12,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "tie_word_embeddings": False,
            **_ROPE,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_SIGMOID,
            "attention_bias": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 2.5,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {
            **{key: value for key, value in _MLA.items() if key != "first_k_dense_replace"},
            **_ROPE,
            "q_lora_rank": 20,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
        },
    ),
    "dots1": ("Dots1Config", {**_SIGMOID, "n_shared_experts": 2, "routed_scaling_factor": 2.5}),
    "minimax_m2": (
        "MiniMaxM2Config",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "intermediate_size": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "rotary_dim": 8,
            **_ROPE,
        },
    ),
}


def import_transformers() -> Any:
    """Import transformers so that it neither logs nor shows bars."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def hf_config(name: str, **own: Any) -> Any:
    """transformers' configuration of one of ``HF_MODELS``, with arguments of one's own."""
    kind, arguments = HF_MODELS[name]
    # transformers writes into the dictionaries that it is given.
    return getattr(import_transformers(), kind)(**copy.deepcopy({**_COMMON, **arguments, **own}))


def random_model(config: Any, **kwargs: Any) -> Any:
    """transformers' model with weights far from their start values, always the same; ``from_config``'s kwargs."""
    torch.manual_seed(0)
    model = import_transformers().AutoModelForCausalLM.from_config(config, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms that are all ones would hide a swap
        for label, buffer in model.named_buffers():
            if label.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return model


def build_hf_model(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "10GB", **changes: Any
) -> Path:
    """Write a model into ``directory`` and return it.

    Args:
        name: one of ``HF_MODELS``.
        directory: to be made.
        dtype: of the weights.
        shard: largest size of a file, as transformers takes it.
        changes: arguments of ``save_pretrained``, or of the configuration with the prefix ``config_``.
    """
    own = {key.removeprefix("config_"): value for key, value in changes.items() if key.startswith("config_")}
    saving = {key: value for key, value in changes.items() if not key.startswith("config_")}
    model = random_model(hf_config(name, **own))
    model.to(dtype).save_pretrained(directory, max_shard_size=shard, **saving)
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    return directory


def add_prediction_block(source: Path, target: Path) -> Path:
    """Give a V3 model its prediction block, as published: another layer, and copies of embedding and head."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        copied = torch.randn(tensors[name].shape, generator=generator)
        tensors[name.replace("layers.2.", "layers.3.")] = copied
    for name, shape in (
        ("enorm", (32,)),
        ("hnorm", (32,)),
        ("eh_proj", (32, 64)),
        ("shared_head.norm", (32,)),
    ):
        tensors[f"model.layers.3.{name}.weight"] = torch.randn(shape, generator=generator)
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def mean_loss_bits(source: Path, batches: Iterable[dict[str, Any]]) -> float:
    """Compute transformers' mean loss of a model's words over batches in the form of fairseq's collater."""
    model = import_transformers().AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["net_input"]["src_tokens"]).logits
        target = batch["target"].reshape(-1)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum"))
        count += len(target)
    return total / count / math.log(2)
