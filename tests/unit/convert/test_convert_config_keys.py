"""Keys of a config.json that change nothing: carried along and named, or refused by name.

Run with ``pytest tests/unit/convert/test_convert_config_keys.py``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.convert.cli import main
from fairseq_moe.convert.hf.config_writer import write_config
from fairseq_moe.convert.hf.families import FAMILIES, read_config, read_keys
from fairseq_moe.convert.hf.harmless_keys import HARMLESS_KEYS, is_harmless
from fairseq_moe.errors import ConfigError
from tests.helpers.hf import import_transformers
from tests.helpers.published_configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DOTS1,
    GLM_4_5,
    GLM_4_7_FLASH,
    KIMI_K2,
    MINIMAX_M2,
    MIXTRAL,
    OLMOE,
    QWEN3,
)

CODER = {
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}


def carried(values: dict[str, Any], **kwargs: Any) -> list[str]:
    return read_keys(values, **kwargs)[1]


class TestKeys:
    def test_what_a_public_file_of_the_family_says_besides_is_named(self) -> None:
        assert carried(QWEN3) == []
        assert carried(QWEN3 | CODER) == sorted(CODER)

    @pytest.mark.parametrize(
        "values",
        [
            MIXTRAL | {"transformers_version": "4.36.0.dev0"},
            MIXTRAL
            | {
                "head_dim": None,
                "router_jitter_noise": 0.0,
                "pad_token_id": None,
                "transformers_version": "5.0",
            },
            OLMOE
            | {
                "_attn_implementation_internal": None,
                "eos_token_id": 50279,
                "pad_token_id": 1,
                "use_cache": True,
            },
            DEEPSEEK_V2 | {"auto_map": {"AutoConfig": "x.Y"}, "bos_token_id": 100000, "use_cache": True},
            DEEPSEEK_V3
            | {"auto_map": {"AutoConfig": "x.Y"}, "transformers_version": "4.33.1", "use_cache": True},
            GLM_4_5,
            GLM_4_7_FLASH,
            DOTS1,
            MINIMAX_M2,
            KIMI_K2,
        ],
        ids=[
            "Mixtral of 2023",
            "Mixtral of 2025",
            "OLMoE",
            "V2",
            "V3",
            "GLM",
            "GLM-Flash",
            "dots",
            "MiniMax",
            "Kimi",
        ],
    )
    def test_public_files_as_they_are_need_no_note(self, values: dict[str, Any]) -> None:
        assert carried(values) == []

    def test_null_is_named_too(self) -> None:
        assert carried(QWEN3 | {"a_key_of_tomorrow": None}) == ["a_key_of_tomorrow"]

    @pytest.mark.parametrize("value", [False, 0, "", 0.0, [], True, 3])
    def test_an_unknown_key_is_refused_whatever_it_holds(self, value: Any) -> None:
        with pytest.raises(
            ConfigError, match=r"the key a_key_of_tomorrow .*--ignore-config-key a_key_of_tomorrow"
        ):
            read_keys(QWEN3 | {"a_key_of_tomorrow": value})

    @pytest.mark.parametrize(("key", "value"), [("qkv_bias", True), ("shared_expert_intermediate_size", 128)])
    def test_a_harmless_key_with_another_value_is_refused(self, key: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"the key {key}"):
            read_keys(QWEN3 | {key: value})

    def test_a_key_that_is_harmless_in_one_family_is_refused_in_another(self) -> None:
        with pytest.raises(ConfigError, match="the key qkv_bias"):
            read_keys(MIXTRAL | {"qkv_bias": False})

    def test_false_is_not_zero(self) -> None:
        with pytest.raises(ConfigError, match="the key shared_expert_intermediate_size"):
            read_keys(QWEN3 | {"shared_expert_intermediate_size": False})

    @pytest.mark.parametrize(
        "left_behind",
        [
            {"unsloth_fixed": True, "unsloth_version": "2025.3"},
            {"_attn_implementation_autoset": True, "_name_or_path": "x", "_commit_hash": "0"},
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "repetition_penalty": 1.1,
                "max_length": 20,
            },
            {"model_creator": "somebody", "quantized_by": "nobody"},
            {"_flash_attn_2_enabled": True, "attn_implementation": "sdpa", "use_flash_attn": True},
            {"transformers.js_config": {}, "base_model": "x", "license": "mit", "model_max_length": 4096},
            {
                "pretraining_tp": 1,
                "ep_size": 8,
                "aux_loss_alpha": 0.001,
                "seq_aux": True,
                "router_z_loss_coef": 0.0,
            },
            {
                "is_decoder": False,
                "add_cross_attention": False,
                "tie_encoder_decoder": False,
                "pruned_heads": {},
            },
        ],
        ids=lambda keys: next(iter(keys)),
    )
    def test_what_tools_leave_behind_is_known_as_a_kind(self, left_behind: dict[str, Any]) -> None:
        for family in (MIXTRAL, QWEN3, DEEPSEEK_V2):
            assert set(carried(family | left_behind)) <= set(left_behind)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_transformers_writes_into_any_config_is_known(self, family: str) -> None:
        transformers = import_transformers()
        values = transformers.PretrainedConfig().to_dict() | transformers.GenerationConfig().to_dict()
        unknown = [key for key in values if not is_harmless(family, key, "whatever it is")]
        assert unknown == ["model_type", "_from_model_config"]  # read; never in a config.json

    @pytest.mark.parametrize(
        "key",
        ["output_gate", "output_multiplier", "_layer_scale", "router_version", "top_k_experts", "drop_path"],
    )
    def test_a_pattern_covers_no_key_that_could_change_the_model(self, key: str) -> None:
        for values in (MIXTRAL, QWEN3, DEEPSEEK_V2):
            with pytest.raises(ConfigError, match=f"the key {key}"):
                read_keys(values | {key: 1})

    def test_the_user_decides(self) -> None:
        values = QWEN3 | {"a_key_of_tomorrow": 0}
        assert carried(values, ignored=["a_key_of_tomorrow"]) == ["a_key_of_tomorrow"]
        with pytest.raises(ConfigError, match="no key another that --ignore-config-key could ignore"):
            read_keys(values, ignored=["a_key_of_tomorrow", "another"])
        with pytest.raises(ConfigError, match="the key num_experts, which the conversion reads"):
            read_keys(values, ignored=["a_key_of_tomorrow", "num_experts"])

    def test_every_entry_of_the_table_has_a_reason_and_known_families(self) -> None:
        for entry in HARMLESS_KEYS:
            assert len(entry.why.split()) >= 2
            assert set(entry.families) <= set(FAMILIES)


def with_keys(source: Path, target: Path, **keys: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | keys))
    return target


def test_keys_survive_the_way_there_and_back(hf_model: Any, tmp_path: Path) -> None:
    source = with_keys(hf_model("qwen3_moe"), tmp_path / "source", **CODER, a_key_of_tomorrow=0)
    done = from_hf(source, tmp_path / "ours", ignored_keys=["a_key_of_tomorrow"])
    (note,) = done.notes
    assert note.endswith(
        "carried along: a_key_of_tomorrow, qkv_bias, shared_expert_intermediate_size, use_qk_norm."
    )
    to_hf(tmp_path / "ours" / "checkpoint.pt", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back.items() >= (CODER | {"a_key_of_tomorrow": 0}).items()


def test_the_command_takes_keys_to_ignore(
    hf_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_keys(hf_model("mixtral"), tmp_path / "source", first=1, second=2)
    command = ["from-hf", str(source), "--to", str(tmp_path / "ours"), "--ignore-config-key", "first"]
    assert main(command) == 2
    assert "the key second (2)" in capsys.readouterr().err
    assert main([*command, "--ignore-config-key", "second"]) == 0
    assert "carried along: first, second." in capsys.readouterr().err


def test_the_way_back_takes_keys_to_ignore_of_another_config(
    hf_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_keys(hf_model("mixtral"), tmp_path / "source", first=1)
    from_hf(hf_model("mixtral"), tmp_path / "ours")
    command = ["to-hf", str(tmp_path / "ours"), "--to", str(tmp_path / "back"), "--companions", str(source)]
    assert main(command) == 2
    assert "pass --ignore-config-key first" in capsys.readouterr().err
    assert main([*command, "--ignore-config-key", "first", "--ignore-config-key", "secnd"]) == 2
    assert "no key secnd that --ignore-config-key could ignore" in capsys.readouterr().err
    assert main([*command, "--ignore-config-key", "first"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["first"] == 1


def test_two_names_of_one_setting_must_agree() -> None:
    assert carried(QWEN3 | {"num_local_experts": QWEN3["num_experts"]}) == []
    with pytest.raises(ConfigError, match="num_experts 128 and num_local_experts 64, two names of one"):
        read_keys(QWEN3 | {"num_local_experts": 64})


@pytest.mark.parametrize(
    ("values", "old", "new"),
    [
        (QWEN3, "num_experts", "num_local_experts"),
        (OLMOE, "num_experts", "num_local_experts"),
        (MIXTRAL, "num_local_experts", "num_experts"),
        (DEEPSEEK_V3, "num_nextn_predict_layers", "num_mtp_layers"),
    ],
    ids=["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"],
)
def test_a_setting_is_written_under_the_name_that_transformers_4_needs(
    values: dict[str, Any], old: str, new: str
) -> None:
    like = {(new if key == old else key): value for key, value in values.items()}
    written = write_config(read_config(like), like=like, dtype="bfloat16")
    assert written[old] == written[new] == values[old]


def test_qwen3_is_written_under_both_names_of_its_number_of_experts(hf_model: Any, tmp_path: Path) -> None:
    source = with_keys(hf_model("qwen3_moe"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts", config.get("num_local_experts"))
    (source / "config.json").write_text(json.dumps(config))
    from_hf(source, tmp_path / "ours")
    to_hf(tmp_path / "ours" / "checkpoint.pt", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["num_experts"] == back["num_local_experts"] == config["num_local_experts"]
