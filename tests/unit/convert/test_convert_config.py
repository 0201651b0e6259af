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
    DOTS1,
    GPT_OSS_20B,
    MIXTRAL,
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


# The first family that has the same model; for the others there are none before them.
WRITTEN_AS = {"glm4_moe_lite": "deepseek_v3", "kimi_k2": "deepseek_v3"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_survives_flags_and_a_new_config(name: str) -> None:
    spec = read_config(PUBLISHED[name][0])
    found = spec_of(flags_of(spec), vocab_size=spec.vocab_size, max_positions=spec.max_positions)
    assert found == replace(spec, family=WRITTEN_AS.get(spec.family, spec.family))
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


def test_windows_are_read_as_transformers_reads_them() -> None:
    mixtral = read_config(MIXTRAL | {"sliding_window": 4096})
    assert (mixtral.window, mixtral.window_layers) == (4096, (True,) * 32)
    on = {"use_sliding_window": True}
    every_second = read_config(QWEN2 | on | {"max_window_layers": 3})
    assert (every_second.window, every_second.window_layers[:5]) == (65536, (True, False, True, False, False))
    assert read_config(QWEN3 | on | {"sliding_window": 512}).window_layers == (True,) * 48
    assert read_config(QWEN3 | {"sliding_window": 512}).window is None
    last = read_config(DOTS1 | {"max_window_layers": 60})
    assert (last.window, last.window_layers) == (4096, (False,) * 60 + (True,) * 2)
    gpt_oss = read_config(GPT_OSS_20B)
    assert (gpt_oss.window, gpt_oss.window_layers) == (128, (True, False) * 12)
    for spec in (mixtral, every_second, last, gpt_oss):
        assert read_config(write_config(spec, dtype="bfloat16")) == spec
        assert spec_of(flags_of(spec), vocab_size=spec.vocab_size, max_positions=spec.max_positions) == spec


def test_untruncated_yarn_is_read_and_written() -> None:
    for truncate in (False, None):
        spec = read_config(MIXTRAL | {"rope_scaling": {**YARN_V4, "truncate": truncate}})
        assert spec.rope.yarn is not None and not spec.rope.yarn.truncate
        written = write_config(spec, dtype="bfloat16")
        assert written["rope_parameters"]["truncate"] is written["rope_scaling"]["truncate"] is False


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


@pytest.mark.parametrize("name", ["deepseek_v2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_prediction_blocks_beside_a_softmax_are_refused(name: str) -> None:
    flags = flags_of(read_config(PUBLISHED[name][0])) | {"mtp_layers": 1}
    with pytest.raises(
        ConfigError, match=r"has --mtp-layers without --moe-router-score-function sigmoid, as this model has"
    ):
        spec_of(flags, vocab_size=100, max_positions=64)


@pytest.mark.parametrize("name", ["dots1", "minimax_m2"])
def test_prediction_blocks_of_families_without_them_are_refused(name: str) -> None:
    spec = replace(read_config(PUBLISHED[name][0]), mtp_layers=1)
    for like in (None, PUBLISHED[name][0]):
        with pytest.raises(
            ConfigError, match=r"cannot describe this model: there .*mtp.layers is 0, expected 1"
        ):
            write_config(spec, like=like, dtype="bfloat16")
