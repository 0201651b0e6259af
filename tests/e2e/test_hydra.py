"""fairseq-hydra-train with expert flags: the plugin in hydra_plugins imports us before hydra composes."""

import re
import sys
from pathlib import Path

import pytest

from tests.e2e.hydra_start import MODEL, TRAINING, hydra_train
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

_TINY_PRESET = [
    *(
        "model=deepseek_v2_lite",
        "model.decoder_layers=2",
        "model.moe_layer_freq='[0,1]'",
        "model.num_experts=8",
    ),
    *(f"model.decoder_{kind}_dim=16" for kind in ("embed", "input", "output", "ffn_embed")),
    *("model.decoder_attention_heads=2", "model.moe_ffn_hidden_size=8", "model.kv_lora_rank=8"),
    *("model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4", "model.v_head_dim=8"),
    "model.moe_shared_expert_intermediate_size=8",
]


@pytest.mark.parametrize(
    ("start", "world_size", "size_of_experts"), [("as_script", 1, "4,288"), ("as_main_module", 2, "2,144")]
)
def test_composed_expert_flags_train(
    start: str, world_size: int, size_of_experts: str, text_data: Path, tmp_path: Path
) -> None:
    result = hydra_train(start, text_data, tmp_path, world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    losses = re.findall(r'\[train_inner\].*"loss": "([\d.]+)"', result.outputs[0])
    assert len(losses) == 3
    assert float(losses[-1]) < float(losses[0])
    assert f"num. expert model params: {size_of_experts}" in result.outputs[0]
    assert list((tmp_path / "save" / "shards").iterdir())


def test_composed_preset_trains(text_data: Path, tmp_path: Path) -> None:
    result = hydra_train("as_script", text_data, tmp_path, model=_TINY_PRESET)
    assert result.exit_code == 0, result.output[-3000:]
    losses = re.findall(r'\[train_inner\].*"loss": "([\d.]+)"', result.outputs[0])
    assert len(losses) == 3 and float(losses[-1]) < float(losses[0])
    assert "num. expert model params: 3,072" in result.outputs[0]  # 8 experts of three matrices


def test_bad_flags_end_with_a_sentence(tmp_path: Path) -> None:
    result = hydra_train("as_script", tmp_path / "no data", tmp_path, "model.moe_freq=3")
    assert result.exit_code == 2, result.output[-3000:]
    assert "fairseq_moe: error: --moe-freq is 3" in result.output
    assert "Traceback" not in result.output


def _sentence(result: CommandResult) -> str:
    assert result.exit_code == 2, result.output[-3000:]
    assert "Traceback" not in result.output
    (sentence,) = re.findall(r"^fairseq_moe: error: (.*\.)$", result.output, flags=re.MULTILINE)
    return str(sentence)


_YAML = """# @package _group_
common: {{user_dir: fairseq_moe, cpu: true}}
dataset: {{batch_size: 4}}
task:
  _name: language_modeling
  data: {data}
model: {{_name: {model}, num_experts: 4}}
criterion: {{_name: moe_cross_entropy}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
"""


@pytest.mark.parametrize(
    ("data", "model", "expected"),
    [
        ("???", "transformer_lm", "task.data is not given"),
        ("no-data", "lightconv_lm", "lightconv_lm is none of them"),
        ("no-data", "transformer", "an encoder-decoder model"),
    ],
)
def test_a_file_of_settings_that_cannot_be_trained_ends_with_a_sentence(
    data: str, model: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "moe.yaml").write_text(_YAML.format(data=data, model=model))
    argv = ["fairseq_cli.hydra_train", "--config-dir", tmp_path, "--config-name", "moe"]
    argv += [f"hydra.run.dir={tmp_path / 'run'}"]
    assert expected in _sentence(run_cli("tests.e2e.starts", argv, cwd=tmp_path, function="as_script"))


def test_data_that_was_not_given_is_asked_for(tmp_path: Path) -> None:
    argv = ["fairseq_cli.hydra_train", "task=language_modeling", *MODEL, *TRAINING]
    argv += [f"hydra.run.dir={tmp_path / 'run'}"]
    result = run_cli("tests.e2e.starts", argv, cwd=tmp_path, function="as_script")
    assert "task.data is not given" in _sentence(result)


def test_hydra_applications_other_than_fairseq_do_not_import_the_package() -> None:
    run_ranks(_set_up_another_application, 1)


def _set_up_another_application(rank: int) -> None:
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    sys.argv = ["my_application.py"]
    plugins = Plugins.instance().discover(SearchPathPlugin)
    (ours,) = [plugin for plugin in plugins if plugin.__name__ == "FairseqMoEPlugin"]
    ours().manipulate_search_path(ConfigSearchPathImpl())
    assert "fairseq_moe" not in sys.modules
    sys.argv = ["/usr/local/bin/fairseq-hydra-train"]
    ours().manipulate_search_path(ConfigSearchPathImpl())
    assert "fairseq_moe" in sys.modules
