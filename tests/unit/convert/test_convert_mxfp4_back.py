"""MXFP4 there and back: untouched experts come back as the blocks that they were, others plain, each layer for itself.

Run with ``pytest tests/unit/convert/test_convert_mxfp4_back.py``.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fairseq_moe.checkpoint import Checkpoint, write_checkpoint
from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.convert.hf import kinds
from fairseq_moe.convert.hf.families import FAMILIES
from fairseq_moe.convert.hf.families.gpt_oss import GPT_OSS
from fairseq_moe.convert.hf.mxfp4 import decoded
from fairseq_moe.errors import CheckpointError

Models = Callable[..., Path]
LISTED = ["model.layers.*.self_attn", "lm_head"]
E, D, F = 4, 32, 64


@pytest.fixture
def source(hf_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mixtral whose experts lie as gpt-oss publishes its own."""
    own = replace(FAMILIES["mixtral"], gate_up=GPT_OSS.gate_up, down=GPT_OSS.down, is_stacked=True)
    monkeypatch.setitem(FAMILIES, "mixtral", own)
    monkeypatch.setattr(kinds, "MXFP4_FAMILIES", {"mixtral"})
    plain = hf_model("mixtral", dtype=torch.bfloat16, save_original_format=False, config_intermediate_size=F)
    target = tmp_path / "source"
    shutil.copytree(plain, target)
    tensors = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if ".experts." in name]:
        outputs, inputs = (2 * F, D) if name.endswith("gate_up_proj") else (D, F)
        assert tensors.pop(name).shape == (E, outputs, inputs)
        shape = (E, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(
            118, 126, shape[:-1], dtype=torch.uint8, generator=generator
        )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": LISTED}
    (target / "config.json").write_text(json.dumps(config))
    return target


def meaning(tensors: dict[str, Tensor], weight: str) -> Tensor:
    """What blocks mean, (E, outputs, inputs)."""
    return decoded(tensors[f"{weight}_blocks"], tensors[f"{weight}_scales"])


def weight_name(layer: int, which: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{which}"


def change(ours: Path, layer: int = 1, expert: int | None = 2, dtype: torch.dtype | None = None) -> None:
    """Change one value of one expert (None: of none) in a checkpoint whose digests are true; ``dtype``: of all."""
    path = ours / "checkpoint.pt"
    found = Checkpoint.open(path)
    shape = found.manifest.shape
    content = found.content(expert_ids=list(range(shape.num_experts)), with_optimizer=False)
    tensors = {key: tensor.load().to(dtype) for key, tensor in content.model.items()}
    if expert is not None:
        tensors[f"decoder.layers.{layer}.moe_layer.experts.fc2_weight"][expert, 3, 5] += 1
    content.model = dict(tensors)
    shutil.rmtree(ours / "shards")
    path.unlink()
    write_checkpoint(
        path, state=found.state, run_id=None, update=0, shape=shape, contents=[content], num_shards=1
    )


@pytest.mark.parametrize("num_shards", [1, 2])
def test_rows_of_ours_are_gate_and_up_of_the_blocks(source: Path, tmp_path: Path, num_shards: int) -> None:
    done = from_hf(source, tmp_path / "ours", expert_parallel_size=num_shards)
    assert done.notes[-1].startswith("MXFP4 weights are now bfloat16, exactly; their blocks are kept in hf")
    theirs = load_file(source / "model.safetensors")
    ours = Checkpoint.open(done.target)
    for layer in range(3):
        prefix = f"model/decoder.layers.{layer}.moe_layer.experts."
        gate_up = meaning(theirs, weight_name(layer, "gate_up_proj"))
        fc1, fc2 = (ours.tensor(f"{prefix}fc{number}_weight").load() for number in (1, 2))
        assert fc1.dtype == torch.bfloat16
        assert torch.equal(fc1[:, :F], gate_up[:, 0::2])
        assert torch.equal(fc1[:, F:], gate_up[:, 1::2])
        assert torch.equal(fc2, meaning(theirs, weight_name(layer, "down_proj")))


@pytest.mark.parametrize("fp8_to", [torch.bfloat16, torch.float32, torch.float16])
def test_what_no_training_changed_comes_back_bit_for_bit(
    source: Path, tmp_path: Path, fp8_to: torch.dtype
) -> None:
    there = from_hf(source, tmp_path / "ours", expert_parallel_size=2, fp8_to=fp8_to)
    back = to_hf(tmp_path / "ours", tmp_path / "back")
    one, other = (path / "model.safetensors" for path in (source, tmp_path / "back"))
    assert one.read_bytes() == other.read_bytes()
    assert back.digest == there.digest
    assert back.notes == ["Names, shapes, dtypes and bits are the same as those of the model it came from."]
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back"))
    assert after["quantization_config"] == before["quantization_config"]
    assert after["dtype"] == "bfloat16"
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        path.name for path in sorted(source.iterdir())
    ]


def test_a_run_in_float32_that_changed_nothing_gives_the_same_blocks(source: Path, tmp_path: Path) -> None:
    from_hf(source, tmp_path / "ours")
    change(tmp_path / "ours", expert=None, dtype=torch.float32)
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.float() if tensor.is_floating_point() else tensor), name


def test_one_changed_expert_makes_its_layer_plain_and_leaves_the_others(source: Path, tmp_path: Path) -> None:
    from_hf(source, tmp_path / "ours")
    change(tmp_path / "ours")
    done = to_hf(tmp_path / "ours", tmp_path / "back")
    assert done.notes[0] == (
        "The experts of 1 of 3 layers have been trained since, and are written plain; those of the others as the "
        "MXFP4 blocks that they came as."
    )
    assert "others than those of the model it came from" in done.notes[1]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [*LISTED, "model.layers.1.mlp.experts"],
    }
    gate_up, down = weight_name(1, "gate_up_proj"), weight_name(1, "down_proj")
    assert torch.equal(after.pop(gate_up), meaning(before, gate_up).transpose(1, 2))
    expected = meaning(before, down).transpose(1, 2).contiguous()
    expected[2, 5, 3] += 1
    assert torch.equal(after.pop(down), expected)
    untouched = {name: tensor for name, tensor in before.items() if ".layers.1.mlp.experts." not in name}
    assert set(after) == set(untouched)
    assert all(torch.equal(after[name], tensor) for name, tensor in untouched.items())
    # What was written so is read, and comes back so, another time.
    again = from_hf(tmp_path / "back", tmp_path / "ours2")
    assert to_hf(tmp_path / "ours2", tmp_path / "back2").digest == again.digest == done.digest
    one, other = ((tmp_path / path / "config.json").read_text() for path in ("back", "back2"))
    assert one == other


def _plain(back: Path, source: Path) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (source, back))
    assert not [name for name in after if name.endswith(("_blocks", "_scales"))]
    name = weight_name(2, "gate_up_proj")
    assert torch.equal(after[name].bfloat16(), meaning(before, name).transpose(1, 2))
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


def test_where_all_were_trained_all_are_plain(source: Path, tmp_path: Path) -> None:
    from_hf(source, tmp_path / "ours")
    for layer in range(3):
        change(tmp_path / "ours", layer=layer, expert=0)
    done = to_hf(tmp_path / "ours", tmp_path / "back")
    assert done.notes[0] == "The experts of 3 of 3 layers have been trained since, and are written plain."
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    _plain(tmp_path / "back", source)
    assert set(after) == {name.removesuffix("_blocks") for name in before if not name.endswith("_scales")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_asks_for_plain_weights(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from_hf(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", dtype=dtype)
    _plain(tmp_path / "back", source)
    assert {tensor.dtype for tensor in load_file(tmp_path / "back" / "model.safetensors").values()} == {dtype}


def test_without_the_files_beside_it_a_checkpoint_gives_plain_weights(source: Path, tmp_path: Path) -> None:
    from_hf(source, tmp_path / "ours")
    (tmp_path / "ours" / "hf").rename(tmp_path / "hf")
    to_hf(tmp_path / "ours", tmp_path / "back")
    _plain(tmp_path / "back", source)
    to_hf(tmp_path / "ours", tmp_path / "again", companions=tmp_path / "hf")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()


def test_blocks_lie_in_files_of_limited_size(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq_moe.convert.original_blocks._MAX_FILE_BYTES", 22_000)
    from_hf(source, tmp_path / "ours")
    kept = sorted((tmp_path / "ours" / "hf").glob("*.safetensors"))
    assert [path.name for path in kept] == [f"mxfp4-0000{number}.safetensors" for number in range(1, 3)]
    assert all(path.stat().st_size < 22_000 + 1000 for path in kept)
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _forget_dtype(path: Path) -> None:
    record = json.loads((path.parent / "conversion.json").read_text())
    for entry in record["mxfp4"].values():
        del entry["dtype"]
    (path.parent / "conversion.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            Path.unlink,
            "has no mxfp4-*.safetensors with model.layers.0.mlp.experts.gate_up_proj_blocks, which",
        ),
        (
            _flip,
            "mxfp4-00001.safetensors is damaged: model.layers.2.mlp.experts.gate_up_proj_scales has another digest",
        ),
        (_forget_dtype, "conversion.json"),
    ],
)
def test_damaged_blocks_are_named_and_nothing_is_written(
    source: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    from_hf(source, tmp_path / "ours")
    damage(tmp_path / "ours" / "hf" / "mxfp4-00001.safetensors")
    with pytest.raises(CheckpointError) as caught:
        to_hf(tmp_path / "ours", tmp_path / "back")
    assert expected in str(caught.value)
    assert not (tmp_path / "back").exists()
    to_hf(tmp_path / "ours", tmp_path / "plain", dtype=torch.bfloat16)
    _plain(tmp_path / "plain", source)


def test_blocks_of_another_shape_than_the_model_are_refused(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    name = weight_name(0, "down_proj")
    for part in ("_blocks", "_scales"):
        tensors[name + part] = tensors[name + part][:3].contiguous()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        from_hf(source, tmp_path / "ours")
    assert f"has {name} of shape (3, 64, 32), expected (4, 64, 32)" in str(caught.value)
