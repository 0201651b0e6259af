"""Logits of converted models equal transformers' on every family; a rule that is read wrongly shows in them."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fairseq_moe.convert.cli import main
from fairseq_moe.convert.hf.names import OurTensor
from fairseq_moe.convert.spec import ModelSpec
from fairseq_moe.convert.verify import our_model, verify
from fairseq_moe.errors import CheckpointError
from tests.helpers.hf import HF_MODELS, add_prediction_block

Models = Callable[..., Path]
converter = importlib.import_module("fairseq_moe.convert.from_hf")


@pytest.mark.parametrize("name", HF_MODELS)
def test_converted_models_give_transformers_logits(name: str, hf_model: Models, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        converter.from_hf(hf_model(name), tmp_path / f"ours{size}", expert_parallel_size=size)
        assert "verified" in verify(hf_model(name), tmp_path / f"ours{size}")


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_a_prediction_block_finds_its_place_and_changes_no_logits(
    name: str, hf_model: Models, tmp_path: Path
) -> None:
    source = add_prediction_block(hf_model(name), tmp_path / "source")
    converter.from_hf(source, tmp_path / "ours")
    assert "verified" in verify(hf_model(name), tmp_path / "ours")
    tensors, model = (
        load_file(source / "model.safetensors"),
        our_model(tmp_path / "ours" / "checkpoint.pt", 97),
    )
    (block,) = model.decoder.mtp
    prefix = "model.layers.3."
    assert torch.equal(block.proj.weight, tensors[f"{prefix}eh_proj.weight"])
    assert torch.equal(block.embed_norm.weight, tensors[f"{prefix}enorm.weight"])
    assert torch.equal(block.hidden_norm.weight, tensors[f"{prefix}hnorm.weight"])
    assert torch.equal(block.norm.weight, tensors[f"{prefix}shared_head.norm.weight"])
    assert torch.equal(
        block.layer.moe_layer.experts.fc2_weight[5], tensors[f"{prefix}mlp.experts.5.down_proj.weight"]
    )


def test_values_may_be_wider_than_keys(hf_model: Models, tmp_path: Path) -> None:
    source = hf_model("deepseek_v3", config_v_head_dim=30)  # queries and keys: 12 + 8
    converter.from_hf(source, tmp_path / "ours")
    assert "verified" in verify(source, tmp_path / "ours")


def _routing(**changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, routing=replace(spec.routing, **changes))


def _rope(**changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, rope=replace(spec.rope, **changes))


def _yarn(**changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    def change(spec: ModelSpec) -> ModelSpec:
        assert spec.rope.yarn is not None
        return replace(spec, rope=replace(spec.rope, yarn=replace(spec.rope.yarn, **changes)))

    return change


# What other converters and launchers got wrong, and neighbours of it: (family, what is read wrongly, as what).
MISREADINGS: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "Mixtral with theta 10000": ("mixtral", _rope(theta=1e4)),
    "Mixtral with eps 1e-3": ("mixtral", lambda spec: replace(spec, norm_eps=1e-3)),
    "Mixtral not renormalised": ("mixtral", _routing(normalized=False)),
    "Mixtral with pairs of neighbours": ("mixtral", _rope(interleaved=True)),
    "Qwen2 renormalised": ("qwen2_moe", _routing(normalized=True)),
    "Qwen3 not renormalised": ("qwen3_moe", _routing(normalized=False)),
    "OLMoE without its bound": ("olmoe", lambda spec: replace(spec, clip_qkv=None)),
    "V2 with Megatron's score of groups": ("deepseek_v2", _routing(group_score="best_two")),
    "V2 without groups": ("deepseek_v2", _routing(num_groups=None, group_topk=None, group_score=None)),
    "V2 without its factor": ("deepseek_v2", _routing(scaling=1.0)),
    "V2 with halves": ("deepseek_v2", _rope(interleaved=False)),
    "V2 without YaRN": ("deepseek_v2", _rope(yarn=None)),
    "V2 without YaRN's scale of scores": ("deepseek_v2", _yarn(mscale=None, mscale_all_dim=None)),
    "V3 with a group's best expert": ("deepseek_v3", _routing(group_score="max")),
    "V3 without groups": ("deepseek_v3", _routing(num_groups=None, group_topk=None, group_score=None)),
    "V3 without its factor": ("deepseek_v3", _routing(scaling=1.0)),
    "GLM with heads that turn whole": ("glm4_moe", _rope(fraction=1.0)),
    "GLM without groups": ("glm4_moe", _routing(num_groups=None, group_topk=None, group_score=None)),
    "MiniMax with half of a head": ("minimax_m2", _rope(fraction=0.5)),
    "dots without its factor": ("dots1", _routing(scaling=1.0)),
    "Flash with halves": ("glm4_moe_lite", _rope(interleaved=False)),
}


@pytest.mark.parametrize("misreading", MISREADINGS)
def test_a_rule_that_is_read_wrongly_shows(
    misreading: str, hf_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change = MISREADINGS[misreading]
    right = converter.read_keys

    def misread(values: dict[str, Any], **kwargs: Any) -> Any:
        spec, carried = right(values, **kwargs)
        return change(spec), carried

    monkeypatch.setattr(converter, "read_keys", misread)
    converter.from_hf(hf_model(name), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"the logits of .* differ"):
        verify(hf_model(name), tmp_path / "ours")


def _with_halves_swapped(tensor: OurTensor) -> OurTensor:
    """Up rows first, then the gate's."""
    swapped = tuple(
        replace(block, first_row=block.shape[0] - block.first_row)
        if "gate_proj" in block.name or "up_proj" in block.name
        else block
        for block in tensor.blocks
    )
    return replace(tensor, blocks=swapped)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2_lite"])
def test_gate_and_up_in_the_wrong_order_show(
    name: str, hf_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = converter.tensor_table
    monkeypatch.setattr(
        converter,
        "tensor_table",
        lambda spec, fused: [_with_halves_swapped(t) for t in right(spec, fused=fused)],
    )
    converter.from_hf(hf_model(name), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"the logits of .* differ"):
        verify(hf_model(name), tmp_path / "ours")


def test_the_command_verifies_both_ways(
    hf_model: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["from-hf", str(hf_model("olmoe")), "--to", str(tmp_path / "ours"), "--verify"]
    assert main(there) == 0
    assert "verified: logits of both models on 96 tokens" in capsys.readouterr().out
    back = ["to-hf", str(tmp_path / "ours"), "--verify", "--to"]
    assert main([*back, str(tmp_path / "back")]) == 0
    assert "verified: logits of both models on 96 tokens" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main([*back, str(tmp_path / "again")]) == 2
    assert "--verify needs transformers" in capsys.readouterr().err
