"""Write a config.json that transformers 4 and 5 both understand."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from fairseq_moe.convert.hf.config_keys import rope_keys
from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.convert.spec import ModelSpec, differences
from fairseq_moe.errors import ConfigError

__all__ = ["write_config"]

# Of the two names that are read here, the one that every transformers knows.
_NUM_EXPERTS = {
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
}


def write_config(
    spec: ModelSpec, *, like: dict[str, Any] | None = None, dtype: str, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Write a config.json for transformers 4 and 5.

    Args:
        spec: what the model is.
        like: the config.json that the model came with; what it says besides is kept, but for quantisation.
        dtype: of the weights, such as ``bfloat16``.
        ignored: keys of ``like`` that the user says change nothing.

    Raises:
        ConfigError: ``like`` describes another model.
    """
    if like is None:
        values = _FRESH[spec.family](spec) | {
            "model_type": spec.family,
            "hidden_act": "silu",
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.model_dim,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "max_position_embeddings": spec.max_positions,
            "rms_norm_eps": spec.norm_eps,
            "initializer_range": spec.init_std,
            "attention_dropout": spec.attention_dropout,
            "num_experts_per_tok": spec.routing.top_k,
            "tie_word_embeddings": spec.tied,
        }
    else:
        values = {key: value for key, value in like.items() if key != "quantization_config"}
    values |= rope_keys(spec.rope) | {"torch_dtype": dtype, "dtype": dtype}
    again = read_config(values, ignored=ignored)
    wrong = differences(spec, replace(again, mtp_layers=spec.mtp_layers))
    # Files may lack the prediction blocks that a config promises (transformers leaves them out), not the other way.
    if spec.mtp_layers not in (0, again.mtp_layers):
        wrong.append(f"--mtp-layers is {again.mtp_layers}, expected {spec.mtp_layers}")
    if wrong:
        subject = (
            f"a config.json of model_type {spec.family}" if like is None else "the config.json it came with"
        )
        raise ConfigError([f"{subject} cannot describe this model: there {'; '.join(wrong)}."])
    # After the comparison, which a number of experts that is written here would hide.
    if spec.family in _NUM_EXPERTS and values.get(_NUM_EXPERTS[spec.family]) is None:
        values[_NUM_EXPERTS[spec.family]] = spec.routing.num_experts
    if values.get("num_mtp_layers") is not None:
        values.setdefault("num_nextn_predict_layers", values["num_mtp_layers"])
    return dict(sorted(values.items()))


def _fresh_mixtral(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "num_local_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "sliding_window": None,
    }


def _fresh_olmoe(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": spec.attention_bias == "all",
        "clip_qkv": spec.clip_qkv,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "norm_topk_prob": spec.routing.normalized,
        "num_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
    }


def _fresh_qwen(spec: ModelSpec) -> dict[str, Any]:
    own: dict[str, Any]
    if spec.family == "qwen2_moe":
        own = {
            "architectures": ["Qwen2MoeForCausalLM"],
            "qkv_bias": spec.attention_bias == "qkv",
            "shared_expert_intermediate_size": spec.shared_ffn_dim,
        }
    else:
        own = {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": spec.attention_bias == "all"}
    return own | {
        "decoder_sparse_step": 1,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "mlp_only_layers": [index for index, is_moe in enumerate(spec.moe_layers) if not is_moe],
        "moe_intermediate_size": spec.expert_ffn_dim,
        "norm_topk_prob": spec.routing.normalized,
        "num_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "use_sliding_window": False,
    }


def _fresh_deepseek(spec: ModelSpec) -> dict[str, Any]:
    assert spec.mla is not None
    routing, is_v3 = spec.routing, spec.family == "deepseek_v3"
    groups = routing.num_groups or 1
    own: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "aux_loss_alpha": routing.aux_loss_coeff,
        "first_k_dense_replace": spec.moe_layers.index(True),
        "intermediate_size": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "kv_lora_rank": spec.mla.kv_lora_rank,
        "moe_intermediate_size": spec.expert_ffn_dim,
        "moe_layer_freq": 1,
        "n_group": groups,
        "n_routed_experts": routing.num_experts,
        "n_shared_experts": (spec.shared_ffn_dim or 0) // spec.expert_ffn_dim or None,
        "norm_topk_prob": routing.normalized,
        "q_lora_rank": spec.mla.q_lora_rank,
        "qk_nope_head_dim": spec.mla.qk_nope_head_dim,
        "qk_rope_head_dim": spec.mla.qk_rope_head_dim,
        "routed_scaling_factor": routing.scaling,
        "scoring_func": routing.score,
        "seq_aux": routing.aux_loss_per_sequence,
        "topk_group": routing.group_topk or 1,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if routing.num_groups else "greedy",
        "v_head_dim": spec.mla.v_head_dim,
    }
    if is_v3:
        own |= {"num_nextn_predict_layers": spec.mtp_layers, "rope_interleave": spec.rope.interleaved}
    return own


_FRESH: dict[str, Callable[[ModelSpec], dict[str, Any]]] = {
    "mixtral": _fresh_mixtral,
    "deepseek_v2": _fresh_deepseek,
    "deepseek_v3": _fresh_deepseek,
    "qwen2_moe": _fresh_qwen,
    "olmoe": _fresh_olmoe,
    "qwen3_moe": _fresh_qwen,
}
