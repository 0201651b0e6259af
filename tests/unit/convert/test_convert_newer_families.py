"""Families of 2025: heads that turn in part, routers in float32, FP8 with scales in bfloat16, Kimi-K2's model_type."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.convert.hf.config_writer import write_config
from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.convert.hf.kinds import fp8_block
from fairseq_moe.convert.spec_flags import flags_of
from fairseq_moe.convert.verify import verify
from fairseq_moe.errors import CheckpointError, ConfigError
from tests.helpers.published_configs import (
    DOTS1,
    GLM_4_5,
    GLM_4_7_FLASH,
    KIMI_K2,
    MINIMAX_M2,
    MIXTRAL,
    PUBLISHED,
    QWEN3,
)

Models = Callable[..., Path]
Values = dict[str, Any]


def without(values: Values, *names: str) -> Values:
    return {key: value for key, value in values.items() if key not in names}


def test_an_absent_share_is_that_of_the_family() -> None:
    bare = without(GLM_4_5, "partial_rotary_factor")
    assert read_config(bare) == read_config(GLM_4_5)
    assert read_config(GLM_4_5).rope.fraction == read_config(MINIMAX_M2).rope.fraction == 0.5
    assert read_config(without(MINIMAX_M2, "rotary_dim")).rope.fraction == 1.0
    assert read_config(DOTS1).rope.fraction == read_config(GLM_4_7_FLASH).rope.fraction == 1.0


def test_a_share_is_read_in_both_forms_and_written_in_both() -> None:
    bare = without(GLM_4_5, "partial_rotary_factor", "rope_theta", "rope_scaling")
    new = bare | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    }
    old = GLM_4_5 | {"partial_rotary_factor": 0.25}
    assert read_config(new) == read_config(old) != read_config(GLM_4_5)
    for values in (new, old):
        written = write_config(read_config(values), like=values, dtype="bfloat16")
        assert written["partial_rotary_factor"] == 0.25
        assert written["rope_parameters"]["partial_rotary_factor"] == 0.25
        assert read_config(written) == read_config(values)
    assert "partial_rotary_factor" not in write_config(read_config(QWEN3), dtype="bfloat16")


@pytest.mark.parametrize(
    "family", ["glm4_moe", "minimax_m2", "dots1", "glm4_moe_lite", "kimi_k2", "deepseek_v2"]
)
def test_routers_of_these_families_compute_in_float32(family: str) -> None:
    assert flags_of(read_config(PUBLISHED[family][0]))["moe_router_dtype"] == "fp32"
    assert "moe_router_dtype" not in flags_of(read_config(QWEN3))


def theta(**settings: Any) -> Values:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **settings}}


REFUSED: dict[str, tuple[Values, Values, str]] = {
    "two shares": (GLM_4_5, theta(partial_rotary_factor=0.25), "which contradict one another"),
    "no share": (GLM_4_5, {"partial_rotary_factor": None}, "null, which transformers does not take for its default"),
    "a share of 0": (GLM_4_5, {"partial_rotary_factor": 0}, "partial_rotary_factor 0, expected a number above 0"),
    "a share above 1": (GLM_4_5, {"partial_rotary_factor": 1.5}, "1.5, expected a number above 0 and at most 1"),
    "half a pair": (GLM_4_5, {"partial_rotary_factor": 0.01}, "turns 1 values of a head, which are no pairs"),
    "a share of another family": (MIXTRAL, {"partial_rotary_factor": 0.5}, "all of a head turns in this family"),
    "one inside": (MIXTRAL, theta(partial_rotary_factor=0.5), "the rope setting partial_rotary_factor, which"),
    "dots' share": (DOTS1, {"partial_rotary_factor": 0.5}, "all of a head turns in this family"),
    "rotary_dim against a share": (
        MINIMAX_M2,
        {"partial_rotary_factor": 0.25},
        "rotary_dim 64 and head_dim 128, which contradict partial_rotary_factor 0.25",
    ),
    "no rotary_dim": (MINIMAX_M2, {"rotary_dim": 0}, "rotary_dim 0, expected a whole number from 1 up"),
    "linear attention": (MINIMAX_M2, {"attn_type_list": [0] + [1] * 61}, "every layer looks at all earlier tokens"),
    "a norm of each head": (MINIMAX_M2, {"qk_norm_type": "per_head"}, "expected 'per_layer': queries and keys"),
    "no norm": (MINIMAX_M2, {"use_qk_norm": False}, "use_qk_norm False, expected True"),
    "no bias": (MINIMAX_M2, {"use_routing_bias": False}, "use_routing_bias False, expected True"),
    "a shared expert": (MINIMAX_M2, {"shared_intermediate_size": 8}, "there is no shared expert in this family"),
    "a softmax": (MINIMAX_M2, {"scoring_func": "softmax"}, "scoring_func 'softmax', expected 'sigmoid'"),
    "heads by chance": (MINIMAX_M2, {"head_dim": None}, "has no head_dim, which this model needs"),
    "not renormalised": (GLM_4_5, {"norm_topk_prob": False}, "norm_topk_prob False, expected True"),
    "no shared expert": (GLM_4_5, {"n_shared_experts": 0}, "n_shared_experts 0, expected a whole number from 1 up"),
    "listed windows": (
        DOTS1,
        {"layer_types": ["sliding_attention"] * 62, "sliding_window": None},
        "layers with sliding_attention, but no sliding_window",
    ),
    "dense layers elsewhere": (GLM_4_7_FLASH, {"first_k_dense_replace": 2}, "transformers reads mlp_layer_types"),
    "kinds of layers": (GLM_4_7_FLASH, {"mlp_layer_types": ["dense"]}, "expected dense or sparse for each of 47"),
    "no factor": (GLM_4_7_FLASH, {"routed_scaling_factor": None}, "has no routed_scaling_factor, which this model"),
    "a model around Kimi-K2": (
        {"model_type": "kimi_k25", "text_config": KIMI_K2},
        {},
        "model_type 'kimi_k25', which sees images through a second model and holds a kimi_k2 under text_config, "
        "expected one of mixtral",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str) -> None:
    values, change, expected = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        read_config(values | change)
    assert expected in str(caught.value)


def test_a_weight_that_is_not_divided_by_the_sum_is_refused_where_it_is_the_default() -> None:
    with pytest.raises(
        ConfigError, match="has no norm_topk_prob, which is false in this family, expected true"
    ):
        read_config(without(DOTS1, "norm_topk_prob"))


def test_layers_without_experts_may_be_listed() -> None:
    kinds = ["dense", "sparse", "dense"] + ["sparse"] * 44
    spec = read_config(GLM_4_7_FLASH | {"mlp_layer_types": kinds})
    assert spec.moe_layers[:4] == (False, True, False, True)
    assert read_config(write_config(spec, dtype="bfloat16")) == spec


def test_windows_that_no_layer_has_are_none() -> None:
    for change in ({"sliding_window": None, "max_window_layers": 3}, {"max_window_layers": 62}):
        assert read_config(DOTS1 | change) == read_config(DOTS1)


def _in_fp8(source: Path, target: Path) -> Path:
    """The same model with all matrices of experts and attention in FP8, scales in bfloat16, blocks of 16 x 16."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name or ".experts." in name]:
        weight = tensors.pop(name)
        grid = tuple(-(-size // 16) for size in weight.shape)
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = (torch.rand(grid) + 0.5).bfloat16()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    settings = MINIMAX_M2["quantization_config"] | {"weight_block_size": [16, 16]}
    (target / "config.json").write_text(json.dumps(values | {"quantization_config": settings}))
    return target


def test_fp8_with_scales_in_bfloat16_becomes_what_it_means(hf_model: Models, tmp_path: Path) -> None:
    source = _in_fp8(hf_model("minimax_m2"), tmp_path / "source")
    assert fp8_block(MINIMAX_M2) == (128, 128)
    done = from_hf(source, tmp_path / "ours", expert_parallel_size=2, fp8_to=torch.float32)
    assert done.notes[-1] == "FP8 weights are now float32; the way back does not quantise."
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    scaled = {name for name in before if name + "_scale_inv" in before}
    assert len(scaled) == 3 * 4 + 3 * 4 * 3
    assert after.keys() == {name for name in before if not name.endswith("_scale_inv")}
    for name, tensor in after.items():
        expected = before[name].float()
        if name in scaled:
            scale = before[name + "_scale_inv"].float().repeat_interleave(16, 0).repeat_interleave(16, 1)
            expected = expected * scale[: expected.shape[0], : expected.shape[1]]
        assert torch.equal(tensor, expected), name


def as_kimi(source: Path, target: Path) -> Path:
    """A DeepSeek-V3 as Kimi-K2 is published: another model_type, and code beside the weights."""
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text())
    named = {key: KIMI_K2[key] for key in ("architectures", "auto_map", "model_type")}
    (target / "config.json").write_text(json.dumps(values | named))
    (target / "modeling_deepseek.py").write_text("raise AssertionError('this is never run')\n")
    return target


def test_kimi_keeps_its_model_type_and_is_compared_as_a_deepseek_v3(hf_model: Models, tmp_path: Path) -> None:
    source = as_kimi(hf_model("deepseek_v3", config_n_group=1, config_topk_group=1), tmp_path / "source")
    there = from_hf(source, tmp_path / "ours", expert_parallel_size=2)
    assert there.spec.family == "kimi_k2" and there.spec.routing.num_groups is None
    assert "verified" in verify(source, tmp_path / "ours")
    assert to_hf(tmp_path / "ours", tmp_path / "back").digest == there.digest
    files = ("model.safetensors", "modeling_deepseek.py")
    assert all((tmp_path / "back" / file).read_bytes() == (source / file).read_bytes() for file in files)
    again, values = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", source))
    assert read_config(again) == read_config(values)
    assert (again["model_type"], again["auto_map"]) == ("kimi_k2", KIMI_K2["auto_map"])
    assert "verified" in verify(tmp_path / "back", tmp_path / "ours")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"] += torch.arange(8.0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the logits of .* differ"):
        verify(source, tmp_path / "ours")
