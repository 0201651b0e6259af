"""Make tiny models of gpt-oss whose experts lie in MXFP4 blocks, as published, with every code in them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.hf import import_transformers, random_model

__all__ = ["GPT_OSS_SIZES", "LISTED", "build_gpt_oss", "meaning"]

# The model's width, that of its experts, experts, layers: unequal, and what stands in blocks divides by 32.
GPT_OSS_SIZES: dict[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_hidden_layers": 3,
}
LISTED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]  # as published


def build_gpt_oss(directory: Path, **changes: Any) -> Path:
    """Write a model into ``directory`` and return it; ``changes``: arguments of its configuration."""
    config = import_transformers().GptOssConfig(
        **{
            **GPT_OSS_SIZES,
            "vocab_size": 97,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts_per_tok": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )
    random_model(config).to(torch.bfloat16).save_pretrained(directory)
    path = directory / "model.safetensors"
    save_file(_in_blocks(load_file(path)), path, metadata={"format": "pt"})
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": LISTED}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def _in_blocks(plain: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = dict(plain)
    for name in [name for name in plain if name.endswith((".gate_up_proj", ".down_proj"))]:
        num_experts, inputs, outputs = tensors.pop(name).shape
        shape = (num_experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        # Values around a tenth, as those of weights.
        scales = torch.randint(120, 125, shape[:-1], dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = scales
    return tensors


def meaning(tensors: dict[str, Tensor], weight: str) -> Tensor:
    """Let transformers say what blocks mean: bfloat16 (E, inputs, outputs)."""
    import_transformers()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found: Tensor = convert_moe_packed_tensors(tensors[f"{weight}_blocks"], tensors[f"{weight}_scales"])
    return found
