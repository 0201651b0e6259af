"""config.json of Granite, Hunyuan and ERNIE: what is read and written in a way of its own, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from fairseq_moe.convert.hf.config_writer import write_config
from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.errors import ConfigError
from tests.helpers.published_configs import ERNIE, GRANITE, HUNYUAN

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a clamp that bites": (ERNIE, {"moe_norm_min": 1e-3}, "moe_norm_min 0.001, expected at most 1e-12"),
    "experts of text and images": (
        ERNIE,
        {"moe_num_experts": [64, 64]},
        "moe_num_experts [64, 64], expected a",
    ),
    "ERNIE's biases": (ERNIE, {"use_bias": True}, "use_bias True, expected False: networks here have no"),
    "no bias in the choice": (
        ERNIE,
        {"moe_use_aux_free": False},
        "key moe_use_aux_free (False), expected True",
    ),
    "ERNIE without experts": (ERNIE, {"moe_layer_interval": 29}, "with no layer with experts"),
    "choices by layer": (
        HUNYUAN,
        {"moe_topk": [8] * 31 + [4]},
        "expected one number, or the same for each of",
    ),
    "shared experts by layer": (HUNYUAN, {"num_shared_expert": [1] * 31 + [2]}, "expected 1 or [1, 1"),
    "experts of another width": (
        HUNYUAN,
        {"moe_intermediate_size": 1024},
        "moe_intermediate_size 1024, expected",
    ),
    "shared keys": (HUNYUAN, {"use_cla": True}, "use_cla True, expected False: layers here share no"),
    "no shared expert": (HUNYUAN, {"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe False, expected True"),
    "no head norm": (HUNYUAN, {"use_qk_norm": False}, "use_qk_norm False, expected True"),
    "dynamic without alpha": (
        HUNYUAN,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope type 'dynamic', expected default or yarn",
    ),
    "alpha elsewhere": (
        GRANITE,
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0}},
        "rope type 'dynamic', expected default or yarn",
    ),
    "a huge alpha": (
        HUNYUAN,
        {"rope_scaling": {"type": "dynamic", "alpha": 1e308}},
        "rope_theta inf, expected a number above 1",
    ),
    "alpha of a word": (
        HUNYUAN,
        {"rope_scaling": {"type": "dynamic", "alpha": "x"}},
        "alpha 'x', expected a number above 0",
    ),
    "no logits": (GRANITE, {"logits_scaling": 0}, "logits_scaling 0, expected a number above 0"),
    "no residual": (
        GRANITE,
        {"residual_multiplier": None},
        "residual_multiplier null, which transformers does not",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused_by_name(name: str) -> None:
    values, change, expected = REFUSED[name]
    read_config(values)
    with pytest.raises(ConfigError) as caught:
        read_config(values | change)
    assert expected in str(caught.value)
    assert len(caught.value.problems) == 1


def test_an_alpha_is_a_larger_theta_and_is_written_as_it_came() -> None:
    spec = read_config(HUNYUAN)
    assert spec.rope.theta == 10000.0 * 1000.0 ** (128 / 126) and spec.rope.yarn is None
    written = write_config(spec, like=HUNYUAN, dtype="bfloat16")
    assert {key: written.get(key) for key in ("rope_theta", "rope_scaling", "rope_parameters")} == {
        "rope_theta": 10000.0,
        "rope_scaling": HUNYUAN["rope_scaling"],
        "rope_parameters": None,
    }
    # Trained on with another theta, it is written anew.
    other = replace(spec, rope=replace(spec.rope, theta=5e5))
    written = write_config(other, like=HUNYUAN, dtype="bfloat16")
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, None)


def test_multipliers_are_read_and_the_usual_one_of_scores_is_none() -> None:
    spec = read_config(GRANITE)
    assert (spec.embedding_multiplier, spec.residual_multiplier) == (12.0, 0.22)
    assert (spec.attention_multiplier, spec.logits_scaling) == (0.015625, 6.0)
    assert read_config(GRANITE | {"attention_multiplier": 0.125}).attention_multiplier is None
    absent = {key: value for key, value in GRANITE.items() if "multiplier" not in key}
    assert read_config(absent).attention_multiplier == 1.0  # as transformers takes it
