"""config.json in both styles to a model and back; what is not understood is refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from fairseq_moe.convert.hf.config_writer import write_config
from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.convert.hf.kinds import fp8_block
from fairseq_moe.convert.hf.names import tensor_table
from fairseq_moe.convert.spec_flags import command_line, flags_of, spec_of
from fairseq_moe.errors import ConfigError
from fairseq_moe.modules.blocks.rope import YarnConfig
from tests.helpers.published_configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    MIXTRAL,
    OLMOE,
    PUBLISHED,
    QWEN2,
    QWEN3,
    YARN_V4,
)


def _numel(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("fused", [False, True])
def test_published_settings_give_the_published_number_of_values(name: str, fused: bool) -> None:
    values, expected = PUBLISHED[name]
    table = tensor_table(read_config(values), fused=fused)
    assert sum(_numel(tensor.shape) for tensor in table) == expected
    assert sum(_numel(block.shape) for tensor in table for block in tensor.blocks) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_survives_flags_and_a_new_config(name: str) -> None:
    spec = read_config(PUBLISHED[name][0])
    assert spec_of(flags_of(spec), vocab_size=spec.vocab_size, max_positions=spec.max_positions) == spec
    assert read_config(write_config(spec, dtype="bfloat16")) == spec
    assert read_config(write_config(spec, like=PUBLISHED[name][0], dtype="bfloat16")) == spec


def test_rope_is_read_in_both_forms_and_written_in_both() -> None:
    old = read_config(DEEPSEEK_V2)
    form = {key: value for key, value in YARN_V4.items() if key != "type"}
    new_keys = {key: value for key, value in DEEPSEEK_V2.items() if not key.startswith("rope_")}
    new_keys["rope_parameters"] = {**form, "rope_type": "yarn", "rope_theta": 10000}
    assert read_config(new_keys) == old
    assert old.rope.yarn == YarnConfig(
        factor=40, original_max_positions=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
    )
    written = write_config(old, like=new_keys, dtype="bfloat16")
    assert written["rope_theta"] == 10000
    assert written["rope_scaling"]["type"] == written["rope_scaling"]["rope_type"] == "yarn"
    assert written["rope_parameters"]["rope_theta"] == 10000
    assert "type" not in written["rope_parameters"]


def test_rope_scaling_without_a_theta_beside_it_counts() -> None:
    old = read_config(DEEPSEEK_V2)
    bare = {key: value for key, value in DEEPSEEK_V2.items() if not key.startswith("rope_")}
    form = {key: value for key, value in YARN_V4.items() if key != "type"} | {"rope_type": "yarn"}
    assert read_config(bare | {"rope_scaling": YARN_V4 | {"rope_theta": 10000}}) == old
    assert read_config(bare | {"rope_scaling": form, "rope_parameters": form | {"rope_theta": 10000}}) == old
    assert read_config(bare | {"rope_theta": 1e4, "rope_scaling": YARN_V4, "rope_parameters": form}) == old
    assert read_config(MIXTRAL | {"rope_scaling": {}, "rope_parameters": {"rope_type": "default"}}) == (
        read_config(MIXTRAL)
    )


def test_what_is_absent_means_what_the_published_code_means() -> None:
    mixtral, qwen2 = read_config(MIXTRAL), read_config(QWEN2)
    assert (mixtral.head_dim, mixtral.norm_eps, mixtral.routing.normalized) == (128, 1e-5, True)
    assert (qwen2.attention_bias, qwen2.shared_gate, qwen2.routing.normalized) == ("qkv", True, False)
    assert read_config(QWEN2 | {"mlp_only_layers": [0, 3], "decoder_sparse_step": 2}).moe_layers[:6] == (
        False, True, False, False, False, True,
    )  # fmt: skip
    assert read_config(DEEPSEEK_V3).moe_layers == (False,) * 3 + (True,) * 58
    assert read_config(DEEPSEEK_V2_LITE).routing.num_groups is None
    assert fp8_block(DEEPSEEK_V3) == (128, 128)
    assert fp8_block(MIXTRAL) is None


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
    "rope setting": (DEEPSEEK_V2, {"rope_scaling": {**YARN_V4, "truncate": False}}, "rope setting truncate"),
    "rope setting null": (
        DEEPSEEK_V2,
        {"rope_scaling": {**YARN_V4, "truncate": None}},
        "rope setting truncate null, expected true",
    ),
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
    "sliding window": (MIXTRAL, {"sliding_window": 4096}, "sliding_window 4096"),
    "Qwen's window": (QWEN2, {"use_sliding_window": True}, "use_sliding_window True, expected False"),
    "layer types": (
        QWEN2,
        {"layer_types": ["sliding_attention"]},
        "layer_types other than full_attention",
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
        "sliding_window 0, expected null: attention here looks at all",
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
    "layer_types": (QWEN2, {"layer_types": 3}, "layer_types 3, expected a list of full_attention"),
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


def test_a_config_that_describes_another_model_is_not_written() -> None:
    spec = read_config(MIXTRAL)
    with pytest.raises(ConfigError, match="there expert_ffn_dim is 14336, expected 8"):
        write_config(replace(spec, expert_ffn_dim=8), like=MIXTRAL, dtype="bfloat16")
    with pytest.raises(
        ConfigError, match="model_type mixtral cannot describe this model: there qk_norm is 'none'"
    ):
        write_config(replace(spec, qk_norm="head"), dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"decoder_normalization": "layernorm"}, "--decoder-normalization rmsnorm"),
        ({"no_scale_embedding": False}, "--no-scale-embedding"),
        ({"use_xmoe": True}, "--use-xmoe"),
        ({"moe_expert_capacity_factor": 1.25}, "--moe-expert-capacity-factor"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type sinkhorn"),
        ({"moe_router_score_function": "sqrtsoftplus"}, "--moe-router-score-function sqrtsoftplus"),
        ({"num_experts": None}, "cannot be written as one of them"),
    ],
)
def test_flags_that_no_family_has_are_refused_by_name(change: dict[str, Any], expected: str) -> None:
    flags = flags_of(read_config(MIXTRAL))
    with pytest.raises(ConfigError) as caught:
        spec_of(flags | change, vocab_size=9, max_positions=9)
    assert expected in str(caught.value)


def test_the_command_line_says_what_the_flags_say() -> None:
    lines = command_line(read_config(DEEPSEEK_V3))
    assert lines[0] == "--arch transformer_lm"
    assert "--moe-layer-freq ([0]*3+[1]*58)" in lines
    assert "--rope-interleaved" in lines
    assert "--max-target-positions 163840" in lines
    assert not any(line.startswith("--share-decoder-input-output-embed") for line in lines)


def test_prediction_blocks_may_be_absent_and_never_surplus() -> None:
    spec = read_config(DEEPSEEK_V3)
    assert write_config(replace(spec, mtp_layers=0), like=DEEPSEEK_V3, dtype="bfloat16")
    for named in (0, 2):
        like = DEEPSEEK_V3 | {"num_nextn_predict_layers": named}
        with pytest.raises(ConfigError, match=f"there --mtp-layers is {named}, expected 1"):
            write_config(spec, like=like, dtype="bfloat16")


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"deepseek_v3"}))
def test_prediction_blocks_of_other_families_are_refused(name: str) -> None:
    flags = flags_of(read_config(PUBLISHED[name][0])) | {"mtp_layers": 1}
    with pytest.raises(
        ConfigError, match=r"no family of Hugging Face's has --mtp-layers without --kv-lora-rank"
    ):
        spec_of(flags, vocab_size=100, max_positions=64)
