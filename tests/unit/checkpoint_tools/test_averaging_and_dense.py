"""`fairseq-moe-checkpoint`: means of checkpoints, and dense ones made of experts."""

import importlib
from argparse import Namespace
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fairseq_moe.checkpoint_tools.dense import MODEL_FLAGS_OF_PLUGIN
from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.formats import (
    EXPERTS,
    model,
    write_branch,
    write_dense,
    write_ours,
)
from tests.helpers.tools import FORMATS, ends_with_sentence, run, write

# --- average


def test_average_is_the_mean_and_has_no_optimizer(tmp_path: Path) -> None:
    seeds = (1, 2, 3)
    paths = [write_ours(tmp_path / f"{seed}.pt", model(seed), update=seed, num_shards=2) for seed in seeds]
    to = tmp_path / "mean.pt"
    run("average", *paths, "--to", to)
    found = contents(to)
    assert sorted(found) == sorted(f"model/{name}" for name in model())
    for name in model():
        exact = torch.stack([model(seed)[name].double() for seed in seeds]).mean(0)
        assert torch.equal(found[f"model/{name}"], exact.float()), name
    manifest = manifest_of(to)
    assert (manifest["update"], len(manifest["shards"])) == (3, 2)
    assert manifest["run_id"] != "run"  # no run was in this state
    assert torch.load(to, weights_only=True)["last_optimizer_state"] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_average_of_dense_checkpoints_is_at_least_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = [write_dense(tmp_path / f"{seed}.pt", seed, update=seed, dtype=dtype) for seed in (1, 2)]
    run("average", *paths, "--to", tmp_path / "mean.pt")
    found = torch.load(tmp_path / "mean.pt", weights_only=True)["model"]
    inputs = [torch.load(path, weights_only=True)["model"] for path in paths]
    assert list(found) == list(inputs[0])
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = (inputs[0][name].double() + inputs[1][name].double()) / 2
        assert torch.equal(tensor.double(), exact.to(tensor.dtype).double()), name
    tied = (found["decoder.output_projection.weight"], found["decoder.embed_tokens.weight"])
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_formats_of_one_model_average(tmp_path: Path) -> None:
    ours = write_ours(tmp_path / "a.pt", model(1), update=9)
    branch = write_branch(tmp_path, model(2))
    run("average", ours, branch, "--to", tmp_path / "mean.pt")
    name = f"{EXPERTS}.fc1_weight"
    assert torch.equal(
        contents(tmp_path / "mean.pt")[f"model/{name}"],
        ((model(1)[name].double() + model(2)[name].double()) / 2).float(),
    )


def test_last_counts_saves_and_not_copies_or_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for update in (1, 2, 3):
        path = write_ours(tmp_path / f"checkpoint_1_{update}.pt", model(update), update=update)
    (tmp_path / "checkpoint_last.pt").write_bytes(path.read_bytes())
    for to in ("checkpoint_mean.pt", "checkpoint_again.pt"):
        run("average", "--last", 2, tmp_path, "--to", tmp_path / to)
        exact = (model(2)[f"{EXPERTS}.fc2_bias"].double() + model(3)[f"{EXPERTS}.fc2_bias"].double()) / 2
        assert torch.equal(contents(tmp_path / to)[f"model/{EXPERTS}.fc2_bias"], exact.float())
    assert "holds 3 different saves" in ends_with_sentence(
        capsys, "average", "--last", 4, tmp_path, "--to", tmp_path / "b.pt"
    )
    write_ours(tmp_path / "checkpoint_other.pt", model(4), update=4, run_id="other")
    assert "not of one run" in ends_with_sentence(
        capsys, "average", "--last", 2, tmp_path, "--to", tmp_path / "b.pt"
    )


def test_average_refuses_what_is_no_mean_of_one_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, to = write_ours(tmp_path / "a.pt"), tmp_path / "b.pt"
    copy = tmp_path / "copy.pt"
    copy.write_bytes(one.read_bytes())
    other = write_ours(tmp_path / "other.pt", model(2, num_experts=2))
    longer = write_ours(tmp_path / "longer.pt", {**model(2), "decoder.extra": torch.ones(1)})
    counts = [
        write_ours(tmp_path / f"count{n}.pt", {**model(), "decoder.count": torch.tensor([n])}) for n in (1, 2)
    ]
    for argv, sentence in (
        ([one], "at least two"),
        ([one, copy], "same save"),
        ([one, other], "differ in decoder.layers.1"),
        ([one, longer], "differ in decoder.extra (missing and (1,))"),
        ([one, write_dense(tmp_path / "dense.pt")], "different models"),
        (counts, "whole numbers"),
        ([one, "--last", 2, tmp_path], "one of the two"),
        ([], "one of the two"),
        (["--last", "two", tmp_path], "found 'two'"),
        (["--last", 2, one], "is none"),
    ):
        assert sentence in ends_with_sentence(capsys, "average", *argv, "--to", to)
        assert not to.exists()


@pytest.mark.parametrize("is_link", [True, False])
def test_last_says_which_file_has_no_content(
    is_link: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for update in (1, 2):
        write_ours(tmp_path / f"checkpoint_1_{update}.pt", model(update), update=update)
    gone = tmp_path / "checkpoint_gone.pt"
    if is_link:
        gone.symlink_to("nothing")
    else:  # a running job has deleted it since it was listed
        listed = [*tmp_path.glob("checkpoint*.pt"), gone]
        monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(listed))
    said = ends_with_sentence(capsys, "average", "--last", 2, tmp_path, "--to", tmp_path / "b.pt")
    assert f"cannot read checkpoint file {gone}" in said


# --- to-dense


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("expert", [0, 3, None])
def test_to_dense_puts_an_expert_or_the_mean_into_the_layer(
    kind: str, expert: int | None, tmp_path: Path
) -> None:
    tensors = model()
    source, to = write(kind, tmp_path, tensors), tmp_path / "dense.pt"
    run("to-dense", source, "--to", to, *(["--mean"] if expert is None else ["--expert", expert]))
    found = torch.load(to, weights_only=True)["model"]
    expected = {name: tensor for name, tensor in tensors.items() if "moe_layer" not in name}
    for matrix in ("fc1", "fc2"):
        for part in ("weight", "bias"):
            rows = tensors[f"{EXPERTS}.{matrix}_{part}"]
            value = rows.double().mean(0).float() if expert is None else rows[expert]
            expected[f"decoder.layers.1.{matrix}.{part}"] = value
    expected["decoder.output_projection.weight"] = tensors["decoder.embed_tokens.weight"]
    assert_same(found, expected)


@pytest.mark.parametrize(
    "argv", [["to-dense", "--mean"], ["to-dense", "--expert", 1], ["reshard", "--shards", 4]]
)
def test_each_file_of_the_branch_is_read_at_most_twice(
    argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once without optimizer state, to verify; once with it where it is copied."""
    source = write("moe branch", tmp_path, model())
    reads: Counter[str] = Counter()
    branch = importlib.import_module("fairseq_moe.checkpoint.branch")
    original = branch.load_plain

    def counting(path: Path, **how: bool) -> object:
        reads[path.name] += 1
        return original(path, **how)

    monkeypatch.setattr(branch, "load_plain", counting)
    run(argv[0], source, "--to", tmp_path / "new.pt", *argv[1:])
    assert len(reads) == 2
    assert set(reads.values()) == {2 if argv[0] == "reshard" else 1}


def test_the_dense_checkpoint_is_stocks(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.pt", max_failed_saves=3, num_experts=None)
    state = torch.load(path, weights_only=True)
    state["cfg"]["optimizer"] = Namespace(lr=[0.5])
    torch.save(state, path)
    run("to-dense", path, "--to", tmp_path / "dense.pt", "--expert", 0)
    dense = torch.load(tmp_path / "dense.pt", weights_only=True)  # knows no Namespace
    assert not MODEL_FLAGS_OF_PLUGIN & dense["cfg"]["model"].keys()
    assert dense["cfg"]["model"]["decoder_ffn_embed_dim"] == 6
    assert dense["cfg"]["criterion"] == {"_name": "cross_entropy", "sentence_avg": False}
    assert dense["cfg"]["optimizer"] == {"lr": [0.5]}
    assert dense["cfg"]["common"]["user_dir"] is None
    assert "fairseq_moe" not in dense
    assert dense["last_optimizer_state"] is None
    assert dense["optimizer_history"][-1]["criterion_name"] == "CrossEntropyCriterion"


def test_every_flag_of_the_plugin_is_left_out() -> None:
    ours = importlib.import_module("fairseq_moe.models.moe_transformer_lm").MoETransformerLanguageModelConfig
    stock = importlib.import_module("fairseq.models.transformer_lm").TransformerLanguageModelConfig
    added = {entry.name for entry in fields(ours)} - {entry.name for entry in fields(stock)}
    assert added == MODEL_FLAGS_OF_PLUGIN - {entry.name for entry in fields(stock)}
    assert not MODEL_FLAGS_OF_PLUGIN & {entry.name for entry in fields(stock)}


def test_to_dense_refuses_what_a_stock_model_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {**model(), "decoder.layers.1.moe_layer.shared_experts.fc1.bias": torch.ones(6)}
    for path, argv, sentence in (
        (write_ours(tmp_path / "a.pt"), ["--expert", 4], "expected 0 to 3"),
        (write_ours(tmp_path / "b.pt"), ["--expert", -1], "expected 0 to 3"),
        (write_ours(tmp_path / "c.pt", model(expert_dim=8)), ["--mean"], "widths [6, 8]"),
        (write_ours(tmp_path / "d.pt", shared), ["--mean"], "shared experts"),
        (write_dense(tmp_path / "e.pt"), ["--mean"], "no experts"),
        (
            write_ours(tmp_path / "g.pt", character_filters="__import__('os').getcwd()"),
            ["--mean"],
            "would run as Python",
        ),
        (write_ours(tmp_path / "f.pt", gated_ffn=True), ["--mean"], "does not know (--gated-ffn)"),
    ):
        assert sentence in ends_with_sentence(capsys, "to-dense", path, "--to", tmp_path / "dense.pt", *argv)
        assert not (tmp_path / "dense.pt").exists()


def test_experts_of_another_width_than_the_flag_become_all_layers(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in model(expert_dim=8).items() if "layers.0" not in name}
    run("to-dense", write_ours(tmp_path / "a.pt", tensors), "--to", tmp_path / "dense.pt", "--expert", 1)
    dense = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert dense["cfg"]["model"]["decoder_ffn_embed_dim"] == 8
