"""MXFP4 there and back: untouched experts come back as the blocks that they were, others plain, each layer for itself.

Run with ``pytest tests/unit/convert/test_convert_mxfp4_back.py``.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_moe.checkpoint import Checkpoint, write_checkpoint
from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.convert.cli import main
from fairseq_moe.errors import CheckpointError
from tests.helpers.hf import import_transformers
from tests.helpers.mxfp4 import GPT_OSS_SIZES, LISTED, build_gpt_oss, meaning

E, D, F = (GPT_OSS_SIZES[key] for key in ("num_local_experts", "hidden_size", "intermediate_size"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss of three layers in blocks; do not write into it."""
    return build_gpt_oss(tmp_path_factory.mktemp("mxfp4") / "source")


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
        fc1, fc2 = (ours.tensor(f"{prefix}fc{number}_weight").load() for number in (1, 2))
        assert fc1.dtype == torch.bfloat16
        gate_up, down = (
            meaning(theirs, weight_name(layer, which)) for which in ("gate_up_proj", "down_proj")
        )
        assert torch.equal(fc1[:, :F], gate_up[:, :, 0::2].transpose(1, 2))
        assert torch.equal(fc1[:, F:], gate_up[:, :, 1::2].transpose(1, 2))
        assert torch.equal(fc2, down.transpose(1, 2))


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
    assert torch.equal(after.pop(gate_up), meaning(before, gate_up))
    expected = meaning(before, down)
    expected[2, 5, 3] += 1
    assert torch.equal(after.pop(down), expected)
    gone = {weight + part for weight in (gate_up, down) for part in ("_blocks", "_scales")}
    untouched = {name: tensor for name, tensor in before.items() if name not in gone}
    assert set(after) == set(untouched)
    assert all(torch.equal(after[name], tensor) for name, tensor in untouched.items())
    # What was written so is read, and comes back so, another time.
    again = from_hf(tmp_path / "back", tmp_path / "ours2")
    assert to_hf(tmp_path / "ours2", tmp_path / "back2").digest == again.digest == done.digest
    one, other = ((tmp_path / path / "config.json").read_text() for path in ("back", "back2"))
    assert one == other


def _loaded(directory: Path) -> dict[str, torch.Tensor]:
    transformers = import_transformers()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(report.values()), report
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


def test_transformers_loads_a_mix_of_blocks_and_plain_weights(source: Path, tmp_path: Path) -> None:
    from_hf(source, tmp_path / "ours")
    change(tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = _loaded(source), _loaded(tmp_path / "back")
    before[weight_name(1, "down_proj")][2, 5, 3] += 1
    assert set(before) == set(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_transformers_computes_the_plain_layers_of_a_mix_plainly_on_a_gpu(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layers get kernels for blocks is settled before weights are read, and needs no GPU."""
    transformers = import_transformers()
    from transformers.integrations import hub_kernels, mxfp4

    from_hf(source, tmp_path / "ours")
    change(tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    settings = transformers.Mxfp4Config(**config.quantization_config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: None)
    mxfp4.replace_with_mxfp4_linear(
        model, quantization_config=settings, modules_to_not_convert=settings.modules_to_not_convert
    )
    in_blocks = [isinstance(layer.mlp.experts, mxfp4.Mxfp4GptOssExperts) for layer in model.model.layers]
    assert in_blocks == [True, False, True]


def _plain(back: Path, source: Path) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (source, back))
    assert not [name for name in after if name.endswith(("_blocks", "_scales"))]
    name = weight_name(2, "gate_up_proj")
    assert torch.equal(after[name].bfloat16(), meaning(before, name))
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
    monkeypatch.setattr("fairseq_moe.convert.original_blocks._MAX_FILE_BYTES", 70_000)
    from_hf(source, tmp_path / "ours")
    kept = sorted((tmp_path / "ours" / "hf").glob("*.safetensors"))
    assert [path.name for path in kept] == [f"mxfp4-0000{number}.safetensors" for number in range(1, 3)]
    assert all(path.stat().st_size < 70_000 + 1000 for path in kept)
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
    shutil.copytree(source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = weight_name(0, "down_proj")
    for part in ("_blocks", "_scales"):
        tensors[name + part] = tensors[name + part][:3].contiguous()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        from_hf(tmp_path / "source", tmp_path / "ours")
    assert f"has {name} of shape ({E - 1}, {F}, {D}), expected ({E}, {F}, {D})" in str(caught.value)


def test_both_directions_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["from-hf", str(source), "--to", ours, "--verify"]) == 0
    change(tmp_path / "ours")
    assert main(["to-hf", ours, "--to", back, "--verify"]) == 0
    assert capsys.readouterr().out.count("verified: logits of both models") == 2


class _LargeTensors(TorchDispatchMode):
    """Count new tensors of at least so many bytes; views are not new."""

    def __init__(self, least_bytes: int) -> None:
        super().__init__()
        self.least_bytes, self.count = least_bytes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage().data_ptr()
            for tensor in tree_leaves((args, kwargs))
            if _is_tensor(tensor)
        }
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            self.count += storage.nbytes() >= self.least_bytes and storage.data_ptr() not in known
        return result


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def test_a_stack_is_in_memory_once_on_the_way_there_and_never_on_the_way_back(tmp_path: Path) -> None:
    num_experts = 16
    source = build_gpt_oss(tmp_path / "source", num_local_experts=num_experts, num_hidden_layers=1)
    half_bytes = num_experts * D * F * 2 // 2  # of the smaller stack, in bfloat16
    with _LargeTensors(half_bytes) as there:
        from_hf(source, tmp_path / "ours")
    assert there.count == 2
    with _LargeTensors(half_bytes) as back:
        to_hf(tmp_path / "ours", tmp_path / "back")
        to_hf(tmp_path / "ours", tmp_path / "plain", dtype=torch.bfloat16)
    assert back.count == 0
