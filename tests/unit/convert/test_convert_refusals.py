"""A config.json of another model than those that we have, or with what is no setting at all, is refused by name."""

from typing import Any

import pytest

from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.convert.hf.kinds import fp8_block
from fairseq_moe.errors import ConfigError
from tests.helpers.published_configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN3,
    YARN_V4,
)

REFUSED = {
    "model_type": (
        MIXTRAL,
        {"model_type": "llama"},
        "model_type 'llama', expected one of mixtral, deepseek_v2",
    ),
    "no model_type": (MIXTRAL, {"model_type": None}, "model_type None"),
    "topk_method": (
        DEEPSEEK_V2,
        {"topk_method": "noaux_tc"},
        "topk_method 'noaux_tc', expected one of greedy",
    ),
    "V3 topk_method": (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method 'greedy', expected 'noaux_tc'"),
    "scoring": (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func 'softmax', expected 'sigmoid'"),
    "V2 renormalised": (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob True, expected False"),
    "layer step": (DEEPSEEK_V2, {"moe_layer_freq": 2}, "moe_layer_freq 2, expected 1"),
    "rope type": (MIXTRAL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    "rope setting": (DEEPSEEK_V2, {"rope_scaling": {**YARN_V4, "truncate": 0}}, "rope setting truncate 0"),
    "gpt-oss without rope": (GPT_OSS_20B, {"rope_scaling": None}, "takes the YaRN of gpt-oss-20b"),
    "yarn without a size": (
        MIXTRAL,
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        "yarn without original_max",
    ),
    "no rope": (MIXTRAL, {"rope_theta": None}, "neither rope_parameters nor rope_theta"),
    "two ropes": (MIXTRAL, {"rope_parameters": {"rope_theta": 1e4}}, "which contradict one another"),
    "scaling against parameters": (
        MIXTRAL,
        {"rope_theta": None, "rope_scaling": YARN_V4, "rope_parameters": {"rope_theta": 1e6}},
        "which contradict one another",
    ),
    "scaling against theta": (
        MIXTRAL,
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}},
        "which contradict one another",
    ),
    "scaling of an unknown type": (
        MIXTRAL,
        {"rope_theta": None, "rope_scaling": {"rope_type": "llama3", "rope_theta": 1e6}},
        "rope type 'llama3', expected default or yarn",
    ),
    "scaling without any theta": (
        MIXTRAL,
        {"rope_theta": None, "rope_scaling": {"rope_type": "default"}},
        "rope_theta None, expected a number above 1",
    ),
    "layer types": (
        QWEN2,
        {"layer_types": ["sliding_attention"]},
        "expected 28 entries full_attention or sliding_attention",
    ),
    "layers with a window that is off": (
        QWEN2,
        {"layer_types": ["sliding_attention"] * 28},
        "layers with sliding_attention, but no sliding_window",
    ),
    "layers without the window of all": (
        QWEN3,
        {"layer_types": ["full_attention"] * 48, "use_sliding_window": True, "sliding_window": 512},
        "expected all layers alike",
    ),
    "activation": (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
    "jitter": (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
    "MLA bias": (DEEPSEEK_V2, {"attention_bias": True}, "attention_bias True, expected False"),
    "unknown key": (
        QWEN3,
        {"attn_output_gate": True},
        "key attn_output_gate (True), which fairseq_moe does not",
    ),
    "missing key": (
        MIXTRAL,
        {"num_key_value_heads": "eight"},
        "num_key_value_heads 'eight', expected a whole number",
    ),
    "no experts": (MIXTRAL, {"num_local_experts": None}, "no num_local_experts or num_experts"),
    "quantisation": (
        MIXTRAL,
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config with quant_method 'awq'",
    ),
    "groups": (DEEPSEEK_V2, {"n_group": 7}, "experts that do not divide over n_group groups"),
    "no groups": (DEEPSEEK_V3, {"n_group": None}, "has no n_group, which this model needs"),
    "no kept groups": (DEEPSEEK_V3, {"topk_group": None}, "has no topk_group, which this model needs"),
    "no factor": (
        DEEPSEEK_V3,
        {"routed_scaling_factor": None},
        "has no routed_scaling_factor, which this model needs",
    ),
    "more kept groups than groups": (DEEPSEEK_V3, {"topk_group": 9}, "topk_group above n_group"),
    "V2's kept groups": (DEEPSEEK_V2, {"topk_group": 9}, "topk_group above n_group"),
    "kept groups of one": (DEEPSEEK_V3, {"n_group": 1, "topk_group": 2}, "topk_group above n_group"),
    "too few experts in groups": (
        DEEPSEEK_V2,
        {"n_group": 160},
        "num_experts_per_tok above the experts of topk_group groups",
    ),
    "groups of one expert": (
        DEEPSEEK_V3,
        {"n_group": 256, "topk_group": 8},
        "groups of one expert, of which the best two are counted",
    ),
    "odd heads": (QWEN3, {"head_dim": 127}, "with an odd head_dim, of which positions turn pairs"),
    "odd heads of latents": (DEEPSEEK_V3, {"qk_rope_head_dim": 63}, "with an odd qk_rope_head_dim"),
    "attention that looks ahead": (
        OLMOE,
        {"is_causal": None},
        "is_causal null, expected True: attention here looks back",
    ),
    "V3's dense layers": (DEEPSEEK_V3, {"first_k_dense_replace": None}, "has no first_k_dense_replace"),
    "a window of nothing": (
        MIXTRAL,
        {"sliding_window": 0},
        "sliding_window 0, expected a whole number from 1 up",
    ),
    "heads": (MIXTRAL, {"num_key_value_heads": 5}, "not a multiple of num_key_value_heads"),
    "one expert": (QWEN3, {"num_experts_per_tok": 1}, "with norm_topk_prob and num_experts_per_tok 1"),
    "Mixtral's one expert": (MIXTRAL, {"num_experts_per_tok": 1}, "with num_experts_per_tok 1"),
}


def _yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": YARN_V4 | changes}


# What is no setting at all: of another type, or out of its range.
MALFORMED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "model_type": (MIXTRAL, {"model_type": ["mixtral"]}, "model_type ['mixtral'], expected one of"),
    "no words": (MIXTRAL, {"vocab_size": 0}, "vocab_size 0, expected a whole number from 1 up"),
    "no heads": (
        MIXTRAL,
        {"num_key_value_heads": 0},
        "num_key_value_heads 0, expected a whole number from 1 up",
    ),
    "half a layer": (MIXTRAL, {"num_hidden_layers": 1.5}, "num_hidden_layers 1.5, expected a whole number"),
    "no rank": (DEEPSEEK_V2, {"q_lora_rank": 0}, "q_lora_rank 0, expected a whole number from 1 up"),
    "shared": (
        DEEPSEEK_V2,
        {"n_shared_experts": -1},
        "n_shared_experts -1, expected a whole number from 0 up",
    ),
    "eps of NaN": (MIXTRAL, {"rms_norm_eps": float("nan")}, "rms_norm_eps nan, expected a number above 0"),
    "eps of 0": (MIXTRAL, {"rms_norm_eps": 0}, "rms_norm_eps 0, expected a number above 0"),
    "infinite bound": (OLMOE, {"clip_qkv": float("inf")}, "clip_qkv inf, expected a number above 0"),
    "a huge number": (MIXTRAL, {"rms_norm_eps": 10**400}, "expected a number above 0"),
    "negative loss": (
        MIXTRAL,
        {"router_aux_loss_coef": -1},
        "router_aux_loss_coef -1, expected a number from 0 up",
    ),
    "no scaling": (
        DEEPSEEK_V3,
        {"routed_scaling_factor": 0},
        "routed_scaling_factor 0, expected a number above 0",
    ),
    "dropout": (MIXTRAL, {"attention_dropout": 1.5}, "a model with attention_dropout above 1"),
    "rope_scaling": (MIXTRAL, {"rope_scaling": "yarn"}, "rope_scaling 'yarn', expected a JSON object"),
    "rope_parameters": (MIXTRAL, {"rope_parameters": [1]}, "rope_parameters [1], expected a JSON object"),
    "rope type": (
        MIXTRAL,
        {"rope_scaling": {"type": ["yarn"]}},
        "rope type ['yarn'], expected default or yarn",
    ),
    "theta below 0": (MIXTRAL, {"rope_theta": -1e4}, "rope_theta -10000.0, expected a number above 1"),
    "theta of NaN": (MIXTRAL, {"rope_theta": float("nan")}, "rope_theta nan, expected a number above 1"),
    "theta of true": (MIXTRAL, {"rope_theta": True}, "rope_theta True, expected a number above 1"),
    "yarn's factor": (
        DEEPSEEK_V2,
        _yarn(factor="x"),
        "the rope setting factor 'x', expected a number above 0",
    ),
    "yarn's factor 0": (DEEPSEEK_V2, _yarn(factor=0), "the rope setting factor 0, expected a number above 0"),
    "yarn's size": (
        DEEPSEEK_V2,
        _yarn(original_max_position_embeddings=4096.5),
        "the rope setting original_max_position_embeddings 4096.5, expected a whole number from 1 up",
    ),
    "yarn's mscale": (
        DEEPSEEK_V2,
        _yarn(mscale=[1]),
        "the rope setting mscale [1], expected a number from 0 up",
    ),
    "yarn's beta": (
        DEEPSEEK_V2,
        _yarn(beta_slow=0),
        "the rope setting beta_slow 0, expected a number above 0",
    ),
    "layer_types": (QWEN2, {"layer_types": 3}, "layer_types 3, expected 28 entries full_attention"),
    "layers of true": (
        QWEN2,
        {"mlp_only_layers": [True]},
        "mlp_only_layers [True], expected a list of layers",
    ),
    "blocks of true": (
        DEEPSEEK_V3,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [True, True]}},
        "weight_block_size [True, True], expected fp8",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_setting_is_refused_in_one_sentence(name: str) -> None:
    values, change, expected = MALFORMED[name]
    with pytest.raises(ConfigError) as caught:
        read_config(values | change)
    assert expected in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused_by_name(name: str) -> None:
    values, change, expected = REFUSED[name]
    read_config(values)
    fp8_block(values)
    with pytest.raises(ConfigError) as caught:
        read_config(values | change)
    assert expected in str(caught.value)
    assert len(caught.value.problems) == 1
