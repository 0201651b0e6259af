"""Every family there and back: files of transformers come back byte for byte; what is wrong is said in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairseq_moe.checkpoint import Checkpoint
from fairseq_moe.convert import from_hf, to_hf
from fairseq_moe.convert.cli import main
from fairseq_moe.convert.hf.directory import INDEX
from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.errors import CheckpointError, ConfigError, MoEError
from tests.helpers.hf import HF_MODELS, add_prediction_block
from tests.helpers.ranks import run_ranks

Models = Callable[..., Path]
LAYOUTS = {
    "single file": {},
    "shards of bfloat16": {"shard": "30KB", "dtype": torch.bfloat16},
    "fused experts": {"save_original_format": False},
    "tied head": {"config_tie_word_embeddings": True},
}


def _same_files(one: Path, other: Path, pattern: str) -> None:
    names = sorted(path.name for path in one.glob(pattern))
    assert names == sorted(path.name for path in other.glob(pattern))
    assert names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HF_MODELS)
def test_back_conversion_gives_the_same_files(
    name: str, layout: str, hf_model: Models, tmp_path: Path
) -> None:
    source = hf_model(name, **LAYOUTS[layout])
    there = from_hf(source, tmp_path / "ours", expert_parallel_size=2)
    back = to_hf(tmp_path / "ours", tmp_path / "back")
    _same_files(source, tmp_path / "back", "*.safetensors*")
    assert back.digest == there.digest
    assert "are the same as those of the model it came from" in back.notes[0]
    values = json.loads((source / "config.json").read_text())
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert read_config(again) == read_config(values)
    assert {key: again[key] for key in values if key != "rope_parameters"} == {
        key: value for key, value in values.items() if key != "rope_parameters"
    }
    assert (tmp_path / "back" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert not (tmp_path / "back" / "conversion.json").exists()


def test_files_of_other_writers_come_back_with_the_same_tensors_in_the_same_places(
    hf_model: Models, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(hf_model("mixtral", shard="30KB"), source)
    for path in source.glob("*.safetensors"):
        save_file(load_file(path), path)  # no metadata
    index = json.loads((source / INDEX).read_text())
    del index["metadata"]["total_parameters"]
    (source / INDEX).write_text(json.dumps(index))
    there = from_hf(source, tmp_path / "ours")
    assert to_hf(tmp_path / "ours", tmp_path / "back").digest == there.digest
    again = json.loads((tmp_path / "back" / INDEX).read_text())
    assert again["weight_map"] == index["weight_map"]
    assert again["metadata"].pop("total_parameters") > 0
    assert again["metadata"] == index["metadata"]


@pytest.mark.parametrize(
    ("name", "num_experts"), [("deepseek_v3", 8), ("granitemoeshared", 4), ("ernie4_5_moe", 4)]
)
def test_any_expert_parallel_size_gives_the_same_bits(
    name: str, num_experts: int, hf_model: Models, tmp_path: Path
) -> None:
    source = hf_model(name)
    for size in (1, 2, 4, 8)[: num_experts.bit_length()]:
        from_hf(source, tmp_path / f"ours{size}", expert_parallel_size=size)
        assert len(list((tmp_path / f"ours{size}" / "shards").glob("*/*"))) == size
        to_hf(tmp_path / f"ours{size}", tmp_path / f"back{size}")
        _same_files(source, tmp_path / f"back{size}", "*.safetensors")
    with pytest.raises(CheckpointError, match=f"{num_experts} experts do not divide over .*size 3"):
        from_hf(source, tmp_path / "ours3", expert_parallel_size=3)
    assert not (tmp_path / "ours3").exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("deepseek_v3", (8, 24, 32)), ("glm4_moe", (8, 40, 32)), ("glm4_moe_lite", (4, 24, 32))],
)
def test_the_prediction_block_is_kept(
    name: str, shape: tuple[int, ...], hf_model: Models, tmp_path: Path
) -> None:
    named = {} if name != "glm4_moe_lite" else {"config_num_nextn_predict_layers": 1}
    source = add_prediction_block(hf_model(name, **named), tmp_path / "source")
    assert from_hf(source, tmp_path / "ours").spec.mtp_layers == 1
    ours = Checkpoint.open(tmp_path / "ours" / "checkpoint.pt")
    assert ours.tensor("model/decoder.mtp.0.layer.moe_layer.experts.fc1_weight").shape == shape
    assert not [key for key in ours.keys() if "embed_tokens" in key and "mtp" in key]  # noqa: SIM118
    to_hf(tmp_path / "ours", tmp_path / "back")
    _same_files(source, tmp_path / "back", "*.safetensors")


def test_a_copy_that_is_no_copy_is_refused(hf_model: Models, tmp_path: Path) -> None:
    source = add_prediction_block(hf_model("deepseek_v3"), tmp_path / "source")
    _change(source, lambda tensors: tensors["model.layers.3.embed_tokens.weight"].add_(1))
    with pytest.raises(
        CheckpointError, match=r"layers.3.embed_tokens.weight of .* differs from model.embed_tokens"
    ):
        from_hf(source, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_ernies_prediction_blocks_are_left_out_with_a_note(hf_model: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(hf_model("ernie4_5_moe"), source)
    names = ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight"]
    tensors = load_file(source / "model.safetensors")
    more = {name: torch.ones(3) for name in names}
    save_file(tensors | more, source / "model.safetensors")
    (note,) = from_hf(source, tmp_path / "ours").notes
    assert note.startswith("2 tensors of prediction blocks") and all(name in note for name in names)
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()
    _change(source, lambda tensors: tensors.update({"model.mtp_other.0.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"has model\.mtp_other\.0\.weight, which the model"):
        from_hf(source, tmp_path / "again")


def test_prediction_blocks_that_were_not_saved_are_noted(hf_model: Models, tmp_path: Path) -> None:
    done = from_hf(hf_model("deepseek_v3"), tmp_path / "ours")
    assert done.notes == ["config.json names 1 multi-token prediction blocks, the files hold none."]


def _quantized(source: Path, target: Path) -> Path:
    """The same model with its projections in FP8, in ragged blocks of 16 x 16."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name)
        grid = tuple(-(-size // 16) for size in weight.shape)
        scale = torch.rand(grid) + 0.5
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16],
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(values))
    return target


def test_fp8_becomes_what_it_means(hf_model: Models, tmp_path: Path) -> None:
    source = _quantized(hf_model("deepseek_v3"), tmp_path / "source")
    done = from_hf(source, tmp_path / "ours", expert_parallel_size=2, fp8_to=torch.float32)
    assert done.notes[-1] == "FP8 weights are now float32; the way back does not quantise."
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert set(after) == {name for name in before if not name.endswith("_scale_inv")}
    for name, tensor in after.items():
        expected = before[name].float()
        if name + "_scale_inv" in before:
            scale = before[name + "_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
            expected = expected * scale[: expected.shape[0], : expected.shape[1]]
        assert torch.equal(tensor, expected), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def _change(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _to_half(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (
            lambda t: t.update({"model.extra": torch.zeros(1)}),
            "has model.extra, which the model of its config.json",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            "has model.norm.weight of shape (31,), expected (32,)",
        ),
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
            "lacks model.layers.1.block_",
        ),
        (
            _to_half,
            "has parts of decoder.layers.0.moe_layer.experts.fc1_weight in torch.float16 and torch.float32",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], expected: str, hf_model: Models, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(hf_model("mixtral"), source)
    _change(source, change)
    with pytest.raises(CheckpointError) as caught:
        from_hf(source, tmp_path / "ours")
    assert expected in str(caught.value)
    assert str(caught.value).count(". ") == 0, "one sentence"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"], "nothing is left behind"


def test_nothing_is_overwritten(hf_model: Models, tmp_path: Path) -> None:
    from_hf(hf_model("mixtral"), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="exists; nothing is overwritten"):
        from_hf(hf_model("mixtral"), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="exists; nothing is overwritten"):
        to_hf(tmp_path / "ours", tmp_path / "ours")


def test_a_damaged_checkpoint_is_not_converted(hf_model: Models, tmp_path: Path) -> None:
    from_hf(hf_model("mixtral"), tmp_path / "ours")
    shard = next((tmp_path / "ours" / "shards").glob("*/*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="it is damaged"):
        to_hf(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_without_companions_the_config_follows_from_the_flags(hf_model: Models, tmp_path: Path) -> None:
    source = hf_model("qwen3_moe")
    from_hf(source, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "hf")
    done = to_hf(tmp_path / "ours" / "checkpoint.pt", tmp_path / "back")
    assert "there is no tokenizer" in done.notes[0]
    _same_files(source, tmp_path / "back", "*.safetensors")
    values = json.loads((source / "config.json").read_text())
    assert read_config(json.loads((tmp_path / "back" / "config.json").read_text())) == read_config(values)


def test_companions_of_another_model_are_refused(hf_model: Models, tmp_path: Path) -> None:
    from_hf(hf_model("mixtral"), tmp_path / "ours")
    with pytest.raises(
        ConfigError, match=r"the config\.json it came with cannot describe this model: there family"
    ):
        to_hf(tmp_path / "ours", tmp_path / "back", companions=hf_model("olmoe"))
    with pytest.raises(MoEError, match=r"has no config\.json"):
        to_hf(tmp_path / "ours", tmp_path / "back", companions=tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        (
            "../../outside.safetensors",
            "names '../../outside.safetensors', which is not a file of its directory",
        ),
        ("{folder}/outside.safetensors", "outside.safetensors', which is not a file of its directory"),
        (
            "config.json",
            "names 'config.json', which is not a file of its directory that ends in .safetensors",
        ),
        ("nul\0.safetensors", "which is not a file of its directory"),
        (3, "has no weight_map from names to files"),
        ([], "has no weight_map from names to files"),
        (None, "has no weight_map from names to files"),
    ],
)
def test_a_record_that_names_other_places_is_refused(
    weight_map: object, expected: str, hf_model: Models, tmp_path: Path
) -> None:
    from_hf(hf_model("mixtral"), tmp_path / "ours")
    path = tmp_path / "ours" / "hf" / "conversion.json"
    record = json.loads(path.read_text())
    if isinstance(weight_map, str | int):
        file = weight_map.format(folder=tmp_path) if isinstance(weight_map, str) else weight_map
        weight_map = dict.fromkeys(record["weight_map"], file)
    path.write_text(json.dumps(record | {"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        to_hf(tmp_path / "ours", tmp_path / "back")
    assert expected in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours"], "nothing is left behind"


def test_the_dtype_can_be_chosen_and_routers_keep_their_bias(hf_model: Models, tmp_path: Path) -> None:
    from_hf(hf_model("deepseek_v3"), tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    dtypes = {name.endswith("e_score_correction_bias"): tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_large_models_are_written_in_shards(hf_model: Models, tmp_path: Path) -> None:
    from_hf(hf_model("mixtral"), tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "hf")
    to_hf(tmp_path / "ours", tmp_path / "back", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / "back" / file).items()}
    expected = load_file(hf_model("mixtral") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_the_command_reports_and_ends_user_errors_with_a_sentence(
    hf_model: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(hf_model("mixtral"))
    assert main(["from-hf", source, "--to", str(tmp_path / "ours"), "--expert-parallel-size", "2"]) == 0
    there = capsys.readouterr().out
    assert main(["to-hf", str(tmp_path / "ours"), "--to", str(tmp_path / "back")]) == 0
    back = capsys.readouterr()
    digest = next(line for line in there.splitlines() if line.startswith("sha256"))
    assert digest in back.out.splitlines()
    assert main(["from-hf", source, "--to", str(tmp_path / "ours")]) == 2
    failed = capsys.readouterr()
    assert failed.out == ""
    assert failed.err.startswith("fairseq_moe.convert: ")
    assert failed.err.count("\n") == 1


def _modules_after_converting(rank: int, source: Path, folder: Path) -> list[str]:
    import sys

    from_hf(source, folder / "ours")
    to_hf(folder / "ours", folder / "back")
    return [name for name in sys.modules if name.split(".")[0] == "transformers"]


def test_transformers_is_not_needed(hf_model: Models, tmp_path: Path) -> None:
    assert run_ranks(_modules_after_converting, 1, hf_model("mixtral"), tmp_path) == [[]]
