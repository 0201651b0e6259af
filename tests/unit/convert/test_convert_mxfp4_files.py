"""MXFP4 in files: read expert by expert, as what it means; blocks and scales that cannot be understood are named.

Run with ``pytest tests/unit/convert/test_convert_mxfp4_files.py``.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fairseq_moe.checkpoint.safetensors_bytes import bytes_of
from fairseq_moe.convert.hf import directory as directory_module
from fairseq_moe.convert.hf.directory import INDEX, SINGLE, TensorDir
from fairseq_moe.convert.hf.file import StoredTensor, read_tensor
from fairseq_moe.convert.hf.kinds import fp8_block, is_mxfp4, refuse_other_directories
from fairseq_moe.convert.hf.mxfp4 import decoded
from fairseq_moe.errors import CheckpointError, ConfigError

W = "model.layers.0.mlp.experts.gate_up_proj"
E, OUTPUTS, GROUPS = 3, 6, 2


def parts(smallest: int = 110, largest: int = 140) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (E, OUTPUTS, GROUPS, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(smallest, largest, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
    return {f"{W}_blocks": blocks, f"{W}_scales": scales, f"{W}_bias": torch.zeros(E, OUTPUTS)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_read_expert_by_expert_from_two_files(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors, weight_map = parts(), {}
    for number, names in ((1, [f"{W}_scales"]), (2, [f"{W}_blocks", f"{W}_bias"])):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = TensorDir.open(tmp_path, mxfp4=True, fp8_to=dtype)
    assert sorted(found.names()) == [W, f"{W}_bias"]
    assert found.is_mxfp4(W)
    assert not found.is_mxfp4(f"{W}_bias")
    assert (found.shape(W), found.dtype(W)) == ((E, 32 * GROUPS, OUTPUTS), dtype)
    assert sorted(found.parts(W)) == [f"{W}_blocks", f"{W}_scales"]
    expected = decoded(tensors[f"{W}_blocks"], tensors[f"{W}_scales"], dtype=dtype).transpose(1, 2)
    read = [found.read(W, rows=rows) for rows in ((0, 1), (1, 3))]
    assert found.digests == {
        name: hashlib.sha256(bytes_of(tensors[name])).hexdigest() for name in found.parts(W)
    }
    for whole in (torch.cat(read), found.read(W)):
        assert torch.equal(whole, expected)


def test_no_more_than_one_expert_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(parts(), tmp_path / SINGLE)
    shapes = []

    def counted(stored: StoredTensor) -> Tensor:
        shapes.append(stored.shape)
        return read_tensor(stored)

    monkeypatch.setattr(directory_module, "read_tensor", counted)
    TensorDir.open(tmp_path, mxfp4=True).read(W)
    assert shapes == [(1, OUTPUTS, GROUPS, 16), (1, OUTPUTS, GROUPS)] * E


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "is_declared", "expected"),
    [
        (lambda t: None, False, "{W}_blocks of {path} is MXFP4, and config.json has no quantization_config"),
        (lambda t: t.pop(f"{W}_blocks"), True, "{W}_scales of {path} scales blocks that are not there"),
        (lambda t: t.pop(f"{W}_blocks"), False, "{W}_scales of {path} scales blocks that are not there"),
        (lambda t: t.pop(f"{W}_scales"), True, "{W}_blocks of {path} is MXFP4 and has no {W}_scales"),
        (
            lambda t: t.update({W: torch.zeros(E, 64, OUTPUTS)}),
            True,
            "{path} has both {W} and {W}_blocks, so nobody can tell which is the model",
        ),
        (
            lambda t: t.update({f"{W}_blocks": t[f"{W}_blocks"].view(torch.int8)}),
            True,
            "{W}_blocks of {path} is torch.int8 of shape (3, 6, 2, 16), expected uint8",
        ),
        (
            lambda t: t.update({f"{W}_blocks": t[f"{W}_blocks"].flatten(2)}),
            True,
            "{W}_blocks of {path} is torch.uint8 of shape (3, 6, 32), expected uint8 of shape (experts, outputs, "
            "groups, 16)",
        ),
        (
            lambda t: t.update({f"{W}_blocks": t[f"{W}_blocks"].view(3, 6, 4, 8)}),
            True,
            "{W}_blocks of {path} is torch.uint8 of shape (3, 6, 4, 8), expected",
        ),
        (
            lambda t: t.update({f"{W}_scales": t[f"{W}_scales"][:, :5].contiguous()}),
            True,
            "{W}_scales of {path} is torch.uint8 of shape (3, 5, 2), expected uint8 of shape (3, 6, 2) for blocks",
        ),
        (
            lambda t: t.update({f"{W}_scales": t[f"{W}_scales"].float()}),
            True,
            "{W}_scales of {path} is torch.float32 of shape (3, 6, 2), expected uint8",
        ),
    ],
)
def test_blocks_that_cannot_be_understood_are_refused(
    tmp_path: Path, change: Change, is_declared: bool, expected: str
) -> None:
    tensors = parts()
    change(tensors)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        TensorDir.open(tmp_path, mxfp4=is_declared)
    assert expected.format(path=tmp_path, W=W) in str(caught.value)


@pytest.mark.parametrize(
    ("scale", "code", "dtype", "expected"),
    [
        (
            255,
            0,
            torch.bfloat16,
            "{W}_scales with the scale 255, which means no number (1 of 12 scales of expert 1)",
        ),
        (
            254,
            7,
            torch.float32,
            "{W} (expert 1) with the value inf (1 of 384 values), expected finite weights",
        ),
        (
            253,
            14,
            torch.bfloat16,
            "{W} (expert 1) with the value -inf (1 of 384 values), expected finite weights",
        ),
        (
            142,
            7,
            torch.float16,
            "with the value 196608.0 (1 of 384 values), which float16 cannot hold; give another --fp8",
        ),
    ],
)
def test_values_that_are_none_are_refused(
    tmp_path: Path, scale: int, code: int, dtype: torch.dtype, expected: str
) -> None:
    tensors = parts(120, 121)
    tensors[f"{W}_scales"][1, 2, 0] = scale
    tensors[f"{W}_blocks"][1, 2, 0] = 0
    tensors[f"{W}_blocks"][1, 2, 0, 5] = code
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        TensorDir.open(tmp_path, mxfp4=True, fp8_to=dtype).read(W)
    assert expected.format(W=W) in str(caught.value)
    assert str(tmp_path / SINGLE) in str(caught.value)


def test_mxfp4_is_read_of_the_family_that_is_published_so(tmp_path: Path) -> None:
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    for model_type, is_read in (("gpt_oss", True), ("mixtral", False)):
        values = {"model_type": model_type, "quantization_config": settings}
        assert is_mxfp4(values) == is_read
        (tmp_path / "config.json").write_text(json.dumps(values))
        save_file(parts(), tmp_path / SINGLE)
        if is_read:
            refuse_other_directories(tmp_path)
            assert fp8_block(values) is None
        else:
            with pytest.raises(CheckpointError, match=r"quantised by mxfp4, which are not read here"):
                refuse_other_directories(tmp_path)
            with pytest.raises(ConfigError, match=r"quant_method 'mxfp4'"):
                fp8_block(values)
    assert not is_mxfp4({"model_type": "gpt_oss"})
    assert not is_mxfp4({"model_type": "gpt_oss", "quantization_config": {"quant_method": "fp8"}})
