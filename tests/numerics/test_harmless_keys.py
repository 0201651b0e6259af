"""Keys that the table of harmless ones covers change no logits of transformers': to the bit, for every family.

Run with ``pytest tests/numerics/test_harmless_keys.py``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.convert.hf.harmless_keys import HARMLESS_KEYS, is_harmless
from tests.helpers.hf import HF_MODELS, import_transformers

Models = Callable[..., Path]
# For every entry of the table at least one key; odd values where any is harmless.
EXAMPLES: list[tuple[str, Any]] = [
    ("transformers_weights", "model.safetensors"),
    ("add_cross_attention", False), ("tie_encoder_decoder", False), ("use_mrope", False),
    ("is_encoder_decoder", True), ("pruned_heads", {}),
    ("hidden_dropout", 0.0), ("attn_pdrop", 0.0), ("resid_pdrop", 0), ("mlp_dropout", 0.0),
    ("aux_loss_alpha", 0.7), ("seq_aux", False), ("router_aux_loss_coef", 0.7),
    ("use_sliding_window", False), ("qkv_bias", False), ("attention_bias", False), ("mlp_bias", False),
    ("shared_expert_intermediate_size", 0), ("n_shared_experts", 0), ("num_shared_experts", 0),
    ("use_qk_norm", True), ("use_qk_norm", False), ("qk_norm", True), ("qk_norm", False),
    ("num_nextn_predict_layers", 0), ("num_mtp_layers", 0), ("first_k_dense_replace", 0),
    ("decoder_sparse_step", 1), ("moe_layer_freq", 1), ("mlp_only_layers", []), ("norm_topk_prob", True),
    ("initial_context_length", 4096),
    ("n_group", 1), ("topk_group", 1), ("routed_scaling_factor", 1.0), ("scoring_func", "softmax"),
    ("topk_method", "greedy"), ("router_jitter_noise", 0.0), ("rope_interleave", True), ("rope_interleave", False),
    ("max_window_layers", 1), ("pretraining_tp", 2), ("ep_size", 4), ("chunk_size_feed_forward", 3),
    ("output_router_logits", True), ("is_decoder", True), ("use_cache", True), ("top_k", 1), ("temperature", 0.5),
    ("tie_last_hidden_states", False), ("torchscript", False), ("unsloth_fixed", True),
    ("_attn_implementation_autoset", True), ("custom_pipelines", {}), ("transformers.js_config", {}),
    ("use_flash_attn", True),
    ("transformers_version", "4.36.0"), ("license", "mit"), ("model_max_length", 5), ("router_z_loss_coef", 0.7),
    ("moe_capacity", [64, 64, 64]), ("num_nextn_predict_layers", 1), ("moe_gate", "topk"), ("moe_gate_act", "softmax"),
    ("moe_use_aux_free", True), ("compression_ratio", 1.0), ("attention_probs_dropout_prob", 0.0), ("fuse_rope", True),
    ("eod_token_id", 5), ("im_start_id", 6), ("dense_list", [4096, 0]), ("cla_share_factor", 2), ("use_mla", False),
    ("n_group", False), ("topk_group", False), ("routed_scaling_factor", False), ("moe_layer_num_skipped", 0),
    ("norm_type", "rms"), ("use_rotary_pos_emb", True),
    ("moe_router_dtype", "float32"), ("num_mtp_modules", 3), ("use_mtp", True), ("mlp_intermediate_size", 8192),
    ("model_creator", "somebody"), ("tp_size", 2), ("pad_token_id", 3), ("return_dict_in_generate", True),
]  # fmt: skip


def test_every_entry_of_the_table_has_an_example() -> None:
    for entry in HARMLESS_KEYS:
        families = entry.families or ("mixtral",)
        assert any(entry.covers(family, key, value) for family in families for key, value in EXAMPLES), entry


def logits(directory: Path, config: dict[str, Any]) -> torch.Tensor:
    transformers = import_transformers()
    (directory / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", HF_MODELS)
def test_harmless_keys_change_no_logits(name: str, hf_model: Models, tmp_path: Path) -> None:
    source = hf_model(name)
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    expected = logits(tmp_path, config)
    added = {key: value for key, value in EXAMPLES if is_harmless(config["model_type"], key, value)}
    assert len(added) > 20
    assert torch.equal(logits(tmp_path, config | added), expected)
    assert read_config(config | added) == read_config(config)


def test_the_comparison_sees_a_key_that_is_none_of_them(hf_model: Models, tmp_path: Path) -> None:
    source = hf_model("mixtral")
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    assert not torch.equal(logits(tmp_path, config | {"rms_norm_eps": 0.1}), logits(tmp_path, config))
