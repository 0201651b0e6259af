"""Build tiny models of every published family: transformers' configuration, our flags, and the same weights in both."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.helpers.family_kinds import VOCABULARY, Family
from tests.helpers.first_families import FIRST_FAMILIES
from tests.helpers.newer_families import NEWER_FAMILIES
from tests.helpers.presets import WordIds, build_model, parse

__all__ = ["FAMILIES", "VOCABULARY", "build_pair", "our_state"]

FAMILIES: dict[str, Family] = FIRST_FAMILIES | NEWER_FAMILIES


def build_pair(name: str, more_flags: str = "") -> tuple[Any, Any]:
    """Build transformers' model with random weights, norms and biases included, and ours with the same.

    Args:
        name: of the family.
        more_flags: of ours.
    """
    family = FAMILIES[name]
    # transformers writes into the dictionaries that it is given.
    config = getattr(transformers, f"{family.kind}Config")(**copy.deepcopy(family.config))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    theirs = getattr(transformers, f"{family.kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            is_small = value.dim() == 1 and "bias" not in key
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3 + (1.0 if is_small else 0.0))
    args = parse(family.arch, (family.flags + " " + more_flags).split(), max_positions=64)
    ours = build_model(args, WordIds(VOCABULARY)).eval()
    state = our_state(theirs.state_dict(), tied=config.tie_word_embeddings)
    missing, surplus = ours.load_state_dict(state, strict=False)
    assert not surplus and all(key.startswith("decoder.mtp.") for key in missing), (missing, surplus)
    return theirs, ours


_PARTS = {
    "mlp.experts.gate_up_proj_bias": "moe_layer.experts.fc1_bias",
    "mlp.experts.down_proj_bias": "moe_layer.experts.fc2_bias",
    "mlp.router": "moe_layer.router",
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn.q_a_layernorm": "self_attn.q_a_norm",
    "self_attn.kv_a_layernorm": "self_attn.kv_a_norm",
    "self_attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj",
    "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.experts.gate_up_proj": "moe_layer.experts.fc1_weight",
    "mlp.experts.down_proj": "moe_layer.experts.fc2_weight",
    "mlp.gate.weight": "moe_layer.router.weight",
    "mlp.gate.e_score_correction_bias": "moe_layer.router.expert_bias",
    "mlp.e_score_correction_bias": "moe_layer.router.expert_bias",
    "mlp.gate.wg.weight": "moe_layer.router.weight",
    "mlp.gate.moe_statics.e_score_correction_bias": "moe_layer.router.expert_bias",
    "mlp.shared_mlp": "moe_layer.shared_experts",
    "block_sparse_moe.experts.gate_up_proj": "moe_layer.experts.fc1_weight",
    "block_sparse_moe.experts.down_proj": "moe_layer.experts.fc2_weight",
    "block_sparse_moe.router": "moe_layer.router",
    "shared_mlp.input_linear": "moe_layer.shared_experts.fc1",
    "shared_mlp.output_linear": "moe_layer.shared_experts.fc2",
    "query_layernorm": "q_norm",
    "key_layernorm": "k_norm",
    "mlp.shared_expert_gate": "moe_layer.shared_experts.gate",
    "mlp.shared_experts": "moe_layer.shared_experts",
    "mlp.shared_expert": "moe_layer.shared_experts",
    "model.norm": "decoder.layer_norm",
    "model.embed_tokens": "decoder.embed_tokens",
    "lm_head": "decoder.output_projection",
    "model.layers": "decoder.layers",
    "down_proj": "fc2",
    "mlp.": "",
}


def our_state(state: dict[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Convert transformers' tensors (or their gradients) to our names: gate rows, then up rows, in one matrix."""
    found: dict[str, Tensor] = {}
    if any("gate_up_proj_bias" in key for key in state):
        state = {key: _of_gpt_oss(key, value) for key, value in state.items()}
    for key, value in state.items():
        if key.endswith("up_proj.weight"):
            continue
        if key.endswith("gate_proj.weight"):
            value = torch.cat([value, state[key.replace("gate_proj", "up_proj")]])
        name = key.replace("gate_proj", "fc1")
        for old, new in _PARTS.items():
            name = name.replace(old, new)
        found[name] = value.squeeze(0) if name.endswith("expert_bias") else value
    if tied:
        found.pop("decoder.output_projection.weight", None)
    return found


def _of_gpt_oss(key: str, value: Tensor) -> Tensor:
    """Turn matrices round, and sort the alternating outputs of gate and up, as the other families have both."""
    if key.endswith(("gate_up_proj", "down_proj")):
        value = value.transpose(1, 2)
    if "gate_up_proj" in key:
        value = torch.cat([value[:, 0::2], value[:, 1::2]], 1)
    return value.contiguous()
