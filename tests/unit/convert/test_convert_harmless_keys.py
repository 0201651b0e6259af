"""The table of harmless keys is as wide as what transformers leaves behind, and no wider.

Run with ``pytest tests/unit/convert/test_convert_harmless_keys.py``; that the keys change no logits is shown in
``tests/numerics/test_harmless_keys.py``.
"""

from typing import Any

import pytest

from fairseq_moe.convert.hf.config_writer import write_config
from fairseq_moe.convert.hf.families import read_config, read_keys
from fairseq_moe.errors import ConfigError
from tests.helpers.published_configs import (
    DEEPSEEK_V2_LITE,
    MIXTRAL,
    OLMOE,
    PUBLISHED,
    QWEN2,
    QWEN3,
)

ALL = {name: values for name, (values, _) in PUBLISHED.items()}


# Settings of other models, or of a later transformers, that would change what is computed.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        (
            "transformers_weights",
            "other.safetensors",
        ),  # transformers loads this file in place of model.safetensors
        ("output_multiplier", 2.0),
        ("output_scale", 0.5),
        ("router_version", 2),
        ("rope_version", 1),
        ("router_penalty", 0.1),
        ("_layer_scale", 0.5),
        ("per_layer_config", {"0": {"num_experts": 2}}),
        ("use_mrope", True),
        ("sep_layers", 1),
    ],
)
def test_a_pattern_covers_no_setting_of_another_model(key: str, value: Any) -> None:
    for values in ALL.values():
        with pytest.raises(ConfigError, match=f"the key {key} "):
            read_config(values | {key: value})


def test_the_names_of_the_weights_that_are_read_are_harmless() -> None:
    for value in ("model.safetensors", "model.safetensors.index.json"):
        assert read_keys(MIXTRAL | {"transformers_weights": value})[1] == ["transformers_weights"]


@pytest.mark.parametrize(
    ("values", "key", "value", "expected"),
    [
        (QWEN3, "qkv_bias", True, "the key qkv_bias (True), expected False (Qwen3 has no such bias"),
        (QWEN3, "shared_expert_intermediate_size", 128, "(128), expected 0 (no shared expert)"),
        (OLMOE, "use_qk_norm", False, "the key use_qk_norm (False), expected True (Qwen3 and OLMoE always"),
        (MIXTRAL, "num_nextn_predict_layers", 1, "(1), expected 0 (no prediction blocks)"),
        (MIXTRAL, "hidden_dropout", 0.1, "the key hidden_dropout (0.1), expected 0 or 0.0 (no dropout)"),
    ],
)
def test_another_value_than_the_harmless_one_is_refused_with_both_and_the_reason(
    values: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(values | {key: value})
    (problem,) = caught.value.problems
    assert expected in problem
    assert f"--ignore-config-key {key}" in problem
    assert read_keys(values | {key: value}, ignored=[key])[1] == [key]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (MIXTRAL, {"attention_bias": False, "use_sliding_window": False}),
        (OLMOE, {"router_jitter_noise": 0.0, "mlp_only_layers": []}),
        (QWEN2, {"attention_bias": False, "router_jitter_noise": 0}),
        (DEEPSEEK_V2_LITE, {"router_jitter_noise": 0.0}),
    ],
)
def test_what_says_what_the_family_does_anyway_is_harmless(
    values: dict[str, Any], keys: dict[str, Any]
) -> None:
    assert set(read_keys(values | keys)[1]) == set(keys)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "torch_dtype", "dtype"])
def test_what_the_conversion_reads_or_writes_elsewhere_cannot_be_ignored(key: str) -> None:
    with pytest.raises(ConfigError, match=f"the key {key}, which the conversion reads"):
        read_keys(MIXTRAL | {key: "bfloat16" if "dtype" in key else 1}, ignored=[key])


@pytest.mark.parametrize(
    ("values", "published", "other"),
    [
        (MIXTRAL, "num_local_experts", "num_experts"),
        (OLMOE, "num_experts", "num_local_experts"),
        (QWEN2, "num_experts", "num_local_experts"),
        (QWEN3, "num_experts", "num_local_experts"),
    ],
)
def test_the_number_of_experts_is_written_under_its_published_name(
    values: dict[str, Any], published: str, other: str
) -> None:
    spec = read_config(values)
    like = {key: value for key, value in values.items() if key != published} | {other: values[published]}
    for settings in (like, like | {published: None}):
        written = write_config(spec, like=settings, dtype="bfloat16")
        assert written[published] == written[other] == values[published]
    with pytest.raises(ConfigError, match="experts"):
        write_config(spec, like=like | {other: 2 * values[published]}, dtype="bfloat16")
    with pytest.raises(ConfigError, match="experts"):
        write_config(spec, like=values | {published: 2 * values[published]}, dtype="bfloat16")
