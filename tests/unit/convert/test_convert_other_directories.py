"""Adapters, quantised weights and files of other programs are called what they are, before any setting is judged.

Run with ``pytest tests/unit/convert/test_convert_other_directories.py``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairseq_moe.convert.cli import main

# Each of these would be refused too, if it were judged first.
ALSO_WRONG = {"a_key_of_tomorrow": 1, "hidden_act": "gelu"}


def model_with(hf_model: Any, target: Path, *, weights: bool = True, **keys: Any) -> Path:
    ignored = shutil.ignore_patterns() if weights else shutil.ignore_patterns("*.safetensors*")
    shutil.copytree(hf_model("mixtral"), target, ignore=ignored)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | ALSO_WRONG | keys))
    return target


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def refuse(directory: Path) -> str:
        """One sentence, the same with --verify."""
        command = ["from-hf", str(directory), "--to", str(tmp_path / "ours")]
        said = []
        for arguments in (command, [*command, "--verify"]):
            assert main(arguments) == 2
            said.append(capsys.readouterr().err)
        assert not (tmp_path / "ours").exists()
        assert said[0] == said[1]
        assert "a_key_of_tomorrow" not in said[0]
        return said[0]

    return refuse


@pytest.mark.parametrize("base", [None, "someone/Mixtral"])
def test_an_adapter(base: str | None, refusal: Any, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    named = "of a model, someone/Mixtral, not" if base else "of a model, not"
    assert f"holds an adapter (LORA) {named} the model; merge it into its base" in refusal(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").unlink()
    assert "holds an adapter of a model, not the model; merge it" in refusal(tmp_path / "lora")


def test_an_adapter_beside_weights_is_no_whole_model_to_transformers(
    hf_model: Any, refusal: Any, tmp_path: Path
) -> None:
    source = model_with(hf_model, tmp_path / "source")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds weights and an adapter (LORA) beside them" in refusal(source)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ("awq", "awq"),
    ],
    ids=str,
)
def test_quantised_weights(settings: Any, named: str, hf_model: Any, refusal: Any, tmp_path: Path) -> None:
    source = model_with(hf_model, tmp_path / "source", quantization_config=settings, model_type="llama")
    expected = (
        f"holds weights quantised by {named}, which are not read here (quantization_config in config.json"
    )
    assert expected in refusal(source)


def test_weights_of_mlx(hf_model: Any, refusal: Any, tmp_path: Path) -> None:
    settings = {"group_size": 64, "bits": 4}  # it writes them under both names
    source = model_with(hf_model, tmp_path / "source", quantization=settings, quantization_config=settings)
    assert "quantised by MLX" in refusal(source)


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
        ("hf_quant_config.json", "NVIDIA ModelOpt"),
    ],
)
def test_notes_of_quantising_tools(
    file: str, method: str, hf_model: Any, refusal: Any, tmp_path: Path
) -> None:
    source = model_with(hf_model, tmp_path / "source")
    (source / file).write_text("{}")
    assert f"quantised by {method}, which are not read here ({file} says so)" in refusal(source)


def test_fp8_with_one_scale_a_tensor(
    hf_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    source = model_with(hf_model, tmp_path / "source", quantization_config=settings)
    assert main(["from-hf", str(source), "--to", str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err
    assert "read as FP8 in blocks alone" in said
    assert "a_key_of_tomorrow" not in said


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("model-q4_k_m.gguf", "holds model-q4_k_m.gguf, weights of llama.cpp, mostly quantised"),
        ("consolidated-00001-of-2.safetensors", "weights under other names than transformers'"),
        ("model.onnx", "holds model.onnx, a graph for ONNX"),
        (
            "pytorch_model-00001-of-00002.bin",
            "holds its weights in pytorch_model-00001-of-00002.bin, a pickle",
        ),
    ],
    ids=lambda value: value.split(".")[-1] if "." in value else "",
)
def test_files_of_other_programs(
    file: str, expected: str, hf_model: Any, refusal: Any, tmp_path: Path
) -> None:
    source = model_with(hf_model, tmp_path / "source", weights=False)
    (source / file).write_bytes(b"x")
    assert expected in refusal(source)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("model.nemo", "a checkpoint of NeMo's"),
        ("latest_checkpointed_iteration.txt", "the note of a checkpoint of Megatron's"),
        ("checkpoint.pt", "a checkpoint of a training program, which to-hf reads if it is one of ours"),
        ("model-00001-of-00002.safetensors", "a safetensors file, but no model.safetensors.index.json"),
        ("gptq_model-4bit-128g.safetensors", "a safetensors file, but no model.safetensors.index.json"),
    ],
    ids=lambda value: value.split(".")[-1],
)
def test_checkpoints_of_other_forms(
    file: str, what: str, hf_model: Any, refusal: Any, tmp_path: Path
) -> None:
    source = model_with(hf_model, tmp_path / "source", weights=False)
    (source / file).write_bytes(b"x")
    assert f"holds {file}, {what}" in refusal(source)


def test_a_name_of_the_hub_is_no_directory(refusal: Any, tmp_path: Path) -> None:
    said = refusal(tmp_path / "mistralai" / "Mixtral-8x7B")
    assert "is not a directory, and nothing is downloaded here; fetch the model first" in said


@pytest.mark.parametrize(
    ("suffix", "what"),
    [
        ("qweight", "weights quantised by GPTQ or AWQ"),
        ("SCB", "weights quantised by bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "weights quantised by bitsandbytes"),
        ("weight_packed", "weights quantised by compressed-tensors"),
        ("weight_scale", "FP8 weights with one scale per tensor or row"),
        ("scales", "weights quantised in groups"),
        ("lora_A.weight", "a LoRA adapter"),
        ("base_layer.weight", "a LoRA adapter"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_that_say_what_they_are(
    suffix: str, what: str, sharded: bool, hf_model: Any, refusal: Any, tmp_path: Path
) -> None:
    source = model_with(hf_model, tmp_path / "source")
    file, name = source / "model.safetensors", f"model.layers.0.self_attn.q_proj.{suffix}"
    tensors = load_file(file) | {name: torch.zeros(2)}
    if sharded:
        file.unlink()
        file = source / "model-00001-of-00001.safetensors"
        index = {"weight_map": dict.fromkeys(tensors, file.name)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, file)
    assert f"{file} holds {name}, part of {what}, which is not read here" in refusal(source)


def test_an_empty_index_alone(hf_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(hf_model("mixtral"), source, ignore=shutil.ignore_patterns("*.safetensors"))
    (source / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert main(["from-hf", str(source), "--to", str(tmp_path / "ours")]) == 2
    assert "lacks model.embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_pointer_of_git_lfs(file: str, hf_model: Any, refusal: Any, tmp_path: Path) -> None:
    source = model_with(hf_model, tmp_path / "source", weights=False)
    (source / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    index = {"weight_map": {"model.norm.weight": file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{file} is a pointer of Git LFS, not the weights themselves" in refusal(source)


def test_such_files_beside_whole_weights_are_no_hindrance(hf_model: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(hf_model("mixtral"), source)
    for name in ("model-q4.gguf", "pytorch_model.bin", "model.onnx"):
        (source / name).write_bytes(b"x")
    assert main(["from-hf", str(source), "--to", str(tmp_path / "ours")]) == 0
