"""A weight that is not finite, or becomes so in a narrower dtype, is named and refused; nothing is left behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.errors import CheckpointError

Models = Callable[..., Path]
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def _with_value(source: Path, target: Path, name: str, value: float, dtype: torch.dtype) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, target / "model.safetensors")
    return target


def _refused(convert: Callable[..., Any], *args: Any, expected: str, **options: Any) -> None:
    target = args[1]
    with pytest.raises(CheckpointError, match=re.escape(expected)) as caught:
        convert(*args, **options)
    assert str(caught.value).count(". ") == 0, "one sentence"
    assert not [path for path in target.parent.iterdir() if target.name in path.name], (
        "nothing is left behind"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "value"),
    [("model.norm.weight", float("nan")), (EXPERT, float("inf")), ("lm_head.weight", -float("inf"))],
)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_from_hf_names_it(
    name: str, value: float, dtype: torch.dtype, num_shards: int, hf_model: Models, tmp_path: Path
) -> None:
    source = _with_value(hf_model("mixtral"), tmp_path / "source", name, value, dtype)
    expected = f"{source / 'model.safetensors'} has {name} with the value {value} (1 of "
    _refused(from_hf, source, tmp_path / "ours", expected=expected, expert_parallel_size=num_shards)


def test_from_hf_looks_into_fused_experts(hf_model: Models, tmp_path: Path) -> None:
    fused, name = hf_model("mixtral", save_original_format=False), "model.layers.1.mlp.experts.down_proj"
    source = _with_value(fused, tmp_path / "source", name, float("nan"), torch.float32)
    expected = f"has {name} with the value nan (1 of "
    _refused(from_hf, source, tmp_path / "ours", expected=expected, expert_parallel_size=2)


def _fp8(source: Path, target: Path, *, weight: float, scale: float) -> Path:
    """One FP8 matrix that is otherwise 1."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    values = torch.ones_like(tensors[name])
    values[3, 3] = weight
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    tensors[name] = values.to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((1, 1), scale)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("weight", "scale", "to", "expected"),
    [
        (float("nan"), 1.0, torch.float32, "o_proj.weight with the value nan (1 of 1280 values)"),
        (1.0, float("inf"), torch.float32, "o_proj.weight_scale_inv with the value inf (1 of 1 value)"),
        (
            448.0,
            200.0,
            torch.float16,
            "o_proj.weight with the value 89600.0 (1 of 1280 values), which float16 cannot hold; give another --fp8-to",
        ),
    ],
)
def test_from_hf_names_fp8_weights_and_their_scales(
    weight: float, scale: float, to: torch.dtype, expected: str, hf_model: Models, tmp_path: Path
) -> None:
    source = _fp8(hf_model("deepseek_v3"), tmp_path / "source", weight=weight, scale=scale)
    _refused(from_hf, source, tmp_path / "ours", expected=expected, fp8_to=to)


def _spoil(checkpoint: Path, name: str, value: float, dtype: torch.dtype) -> str:
    """Write a value into a checkpoint whose digests are true; returns the shard's name."""
    from fairseq_moe.checkpoint import Checkpoint, write_checkpoint

    found = Checkpoint.open(checkpoint)
    shape = found.manifest.shape
    content = found.content(expert_ids=list(range(shape.num_experts)), with_optimizer=False)
    tensors = {key: tensor.load() for key, tensor in content.model.items()}
    tensors[name].view(-1)[5] = value
    content.model = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    shutil.rmtree(checkpoint.parent / "shards")
    checkpoint.unlink()
    write_checkpoint(
        checkpoint, state=found.state, run_id=None, update=0, shape=shape, contents=[content], num_shards=1
    )
    [shard] = (checkpoint.parent / "shards").glob("*/*.safetensors")
    return str(shard)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (float("nan"), None, "with the value nan (1 of "),
        (1e5, torch.float16, "with the value 100000.0 (1 of "),
        (-1e5, torch.float16, "which float16 cannot hold; give another --dtype"),
    ],
)
@pytest.mark.parametrize(
    "name", ["decoder.layer_norm.weight", "decoder.layers.1.moe_layer.experts.fc1_weight"]
)
def test_to_hf_names_it(
    name: str, value: float, dtype: torch.dtype | None, expected: str, hf_model: Models, tmp_path: Path
) -> None:
    ours = from_hf(hf_model("mixtral"), tmp_path / "ours").target
    shard = _spoil(ours, name, value, torch.float32)
    with pytest.raises(CheckpointError) as caught:
        to_hf(ours, tmp_path / "back", dtype=dtype)
    assert f"{shard} has {name} with the value {value} (1 of " in str(caught.value)
    assert expected in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
