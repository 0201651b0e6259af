"""A run with tensor, context or pipeline ranks is continued by any other; commands ignore the axes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fairseq_moe.checkpoint_tools.command import main as tool
from fairseq_moe.convert.cli import main as convert
from fairseq_moe.convert.verify import verify
from tests.e2e.commands import BASE, DENSE, PLUGIN, eval_lm, json_lines, perplexity, train
from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.converted import flags_of
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

pytestmark = pytest.mark.timeout(300)

# Megatron's routing has no capacity, so which ranks see which tokens drops none. Two micro-batches an update, over all.
MODEL = [
    *DENSE, *("--dropout", 0, "--attention-dropout", 0, "--adam-eps", 1e-4, "--lr-scheduler", "inverse_sqrt"),
    *("--num-experts", 4, "--moe-ffn-hidden-size", 32, "--moe-layer-freq", "[0,1]", "--warmup-updates", 4),
    *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", 1, "--moe-aux-loss-coeff", 0.01),
    *("--batch-size-valid", 1, "--save-interval-updates", 2),
]  # fmt: skip
T2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--update-freq", 2)
C2 = ("--context-parallel-size", 2, "--update-freq", 2)
P2 = ("--pipeline-model-parallel-size", 2, "--update-freq", 2)
# name: number of ranks, flags
LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "T2": (2, T2),
    "C2": (2, C2),
    "P2": (2, P2),
    "alone": (1, ("--update-freq", 2)),
    "data": (2, ("--update-freq", 1)),
}
AXES = ("T2", "C2", "P2")
LAST = "checkpoint_last.pt"


def train_as(data: Path, folder: Path, layout: str, *flags: Any) -> CommandResult:
    world_size, own = LAYOUTS[layout]
    return train(data, folder, *own, *flags, world_size=world_size, model=MODEL)


def numbers(records: list[dict[str, str]], names: tuple[str, ...]) -> list[list[float]]:
    return [[float(record[name]) for name in names] for record in records]


@pytest.fixture(scope="module")
def written(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders in which each layout has made four updates, with files after the second and the fourth."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (*AXES, "alone")}
    for name, folder in folders.items():
        result = train_as(text_data, folder, name)
        (folder / "log.json").write_text(
            json.dumps([json_lines(result, kind) for kind in ("train_inner", "valid")])
        )
    return folders


def logged(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    inner, valid = json.loads((folder / "log.json").read_text())
    return inner, valid


@pytest.mark.parametrize("layout", AXES)
def test_four_updates_are_those_of_one_process(layout: str, written: dict[str, Path]) -> None:
    (inner, valid), (alone_inner, alone_valid) = (logged(written[name]) for name in (layout, "alone"))
    names = ("num_updates", "loss", "moe_aux_loss", "gnorm", "lr")
    assert len(inner) == 4
    for found, expected in zip(numbers(inner, names), numbers(alone_inner, names), strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
    assert len(valid) > 0
    names = ("valid_loss", "valid_inner_loss")
    for found, expected in zip(numbers(valid, names), numbers(alone_valid, names), strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
    assert_near(written[layout] / LAST, written["alone"] / LAST)


def assert_near(found_main: Path, expected_main: Path) -> None:
    found, expected = contents(found_main), contents(expected_main)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # A key's bias moves all scores of a query alike: its gradient is rounding, which Adam blows up.
        if key.startswith("model/") and "k_proj.bias" not in key:
            assert (found[key] - value).abs().max() <= 1e-4, key


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", AXES)
def test_any_layout_continues(
    writer: str, reader: str, written: dict[str, Path], text_data: Path, tmp_path: Path
) -> None:
    start = written[writer] / "checkpoint_1_2.pt"
    result = train_as(text_data, tmp_path, reader, "--restore-file", start, "--disable-validation")
    names = ("num_updates", "loss", "gnorm", "lr")
    found = numbers(json_lines(result, "train_inner"), names)
    expected = numbers(logged(written["alone"])[0][2:], names)
    assert [update for update, *_ in found] == [3, 4]
    for own, wanted in zip(found, expected, strict=True):  # other words would have another loss
        assert own == pytest.approx(wanted, abs=2e-3)
    assert_near(tmp_path / LAST, written["alone"] / LAST)


def validated(data: Path, checkpoint: Path, world_size: int) -> list[float]:
    argv = [data, *PLUGIN, "--cpu", "--num-workers", "0", "--path", checkpoint, "--log-format", "json"]
    argv += ["--task", "language_modeling", "--tokens-per-sample", "32", "--batch-size", "1"]
    argv += ["--valid-subset", "valid", "--required-batch-size-multiple", "1"]
    result = run_cli("fairseq_cli.validate", argv, world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    return numbers(json_lines(result, "valid"), ("valid_loss", "valid_inner_loss"))[0]


@pytest.mark.parametrize("layout", AXES)
def test_evaluation_ignores_the_axes(layout: str, written: dict[str, Path], text_data: Path) -> None:
    found, expected = (written[name] / LAST for name in (layout, "alone"))
    for world_size in (1, 2):
        own, wanted = (
            perplexity(eval_lm(text_data, each, world_size=world_size)) for each in (found, expected)
        )
        assert own == pytest.approx(wanted, rel=1e-4)
        own_losses = validated(text_data, found, world_size)
        assert own_losses == pytest.approx(validated(text_data, expected, world_size), abs=2e-3)
    during = numbers(logged(written[layout])[1], ("valid_loss", "valid_inner_loss"))
    assert during[-1][1] == pytest.approx(own_losses[1], abs=2e-3)


@pytest.mark.parametrize("layout", AXES)
def test_generation_ignores_the_axes(
    layout: str, written: dict[str, Path], text_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "input.txt").write_text("the value of\nis a\n")
    texts = []
    for path in (written[layout] / LAST, written["alone"] / LAST):
        reading = [text_data, *PLUGIN, "--cpu", "--num-workers", "0", "--path", path, "--max-len-b", "10"]
        reading += ["--task", "language_modeling", "--tokens-per-sample", "32", "--sample-break-mode", "eos"]
        found = []
        for command, flags in (
            ("interactive", ["--input", tmp_path / "input.txt"]),
            (
                "generate",
                ["--gen-subset", "valid", "--prefix-size", "3", "--required-batch-size-multiple", "1"],
            ),
        ):
            result = run_cli(f"fairseq_cli.{command}", [*reading, *flags, "--beam", "1"])
            assert result.exit_code == 0, result.output[-3000:]
            found.append(re.findall(r"^H-(\d+)\t\S+\t(.*)$", result.output, flags=re.MULTILINE))
        texts.append(found)
    assert texts[0] == texts[1]
    assert [len(found) for found in texts[0]] == [2, 21]


def run_tool(*argv: object) -> None:
    assert tool([str(part) for part in argv]) == 0


@pytest.mark.parametrize("layout", AXES)
def test_tools_ignore_the_axes(
    layout: str, written: dict[str, Path], text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written[layout] / LAST
    assert len(manifest_of(source)["shards"]) == 2
    run_tool("verify", source)
    run_tool("inspect", source)
    assert "4 experts" in capsys.readouterr().out
    one, mean, dense = tmp_path / "one" / "a.pt", tmp_path / "mean.pt", tmp_path / "dense.pt"
    run_tool("consolidate", source, "--to", one)
    assert_same(contents(one), contents(source))
    run_tool("average", "--last", 2, written[layout], "--to", mean)
    both = [contents(written[layout] / f"checkpoint_1_{update}.pt") for update in (2, 4)]
    for key, tensor in contents(mean).items():
        assert torch.equal(tensor, ((both[0][key].double() + both[1][key].double()) / 2).float()), key
    run_tool("to-dense", source, "--to", dense, "--mean")
    scores = [perplexity(eval_lm(text_data, path)) for path in (source, one, mean, dense)]
    assert scores[0] == scores[1]
    assert scores[2] != scores[0]
    assert perplexity(eval_lm(text_data, dense, plugin=False)) == scores[3]  # by stock alone


def write_ids(rank: int, folder: str) -> None:
    """Write a text of a converted model: lines of 13 of its 97 ids, the end of a line with each."""
    from fairseq.data import indexed_dataset

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "valid"):
        builder = indexed_dataset.make_builder(f"{folder}/{split}.bin", impl="mmap", vocab_size=97)
        for _ in range(8):
            builder.add_item(torch.cat([torch.randint(3, 97, (13,), generator=generator), torch.tensor([2])]))
        builder.finalize(f"{folder}/{split}.idx")


def rewrite(rank: int, model: Path, source: Path, folder: Path) -> None:
    """Read a checkpoint of a converted model, and write it again; for one process."""
    from fairseq import checkpoint_utils

    from tests.helpers.converted import build_converted, converted_config

    cfg = converted_config(model, 1, ["--ddp-backend", "legacy_ddp", "--adam-eps", 1e-3])
    trainer = build_converted(cfg, rank, {"restore_file": str(source), "save_dir": str(folder)})
    position = trainer.load_checkpoint(str(source))["train_iterator"]
    assert trainer.get_num_updates() == 2
    iterator = SimpleNamespace(epoch=1, end_of_epoch=lambda: False, state_dict=lambda: position)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, None)


# Three layers of a published model, the first rank's of a pipeline being one, or four.
OF_CONVERTED: dict[str, tuple[int, tuple[Any, ...]]] = {
    "T2": (3, T2),
    "C2": (3, C2),
    "P2": (3, (*P2, "--decoder-first-pipeline-num-layers", 1)),
    "P2 V2": (4, (*P2, "--num-virtual-stages-per-pipeline-rank", 2)),
}


def train_converted(data: Path, model: Path, folder: Path, world_size: int, flags: tuple[Any, ...]) -> Path:
    """Do two updates; returns the checkpoint."""
    argv = [data, *PLUGIN, *BASE, *flags_of(model), *flags, "--save-dir", folder, "--max-update", 2]
    argv += ["--restore-file", model / "checkpoint.pt", "--reset-optimizer", "--reset-dataloader"]
    argv += ["--reset-meters", "--reset-lr-scheduler", "--ddp-backend", "legacy_ddp", "--disable-validation"]
    argv += ["--task", "language_modeling", "--tokens-per-sample", 30, "--sample-break-mode", "eos"]
    argv += ["--criterion", "moe_cross_entropy", "--optimizer", "adam", "--adam-eps", 1e-3]
    argv += ["--lr", 0.01, "--batch-size", 2]
    result = run_cli("fairseq_cli.train", argv, world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    return folder / LAST


def given_back(checkpoint: Path, *flags: str) -> Path:
    """Convert a checkpoint to Hugging Face's files, and look whether they compute the same."""
    folder = checkpoint.parent / "back"
    assert convert(["to-hf", str(checkpoint), "--to", str(folder), *flags]) == 0
    assert "verified" in verify(folder, checkpoint)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", OF_CONVERTED)
def test_a_converted_model_is_trained_and_given_back(
    layout: str, hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Through commands alone; every family by the trainer: tests/distributed/test_axes_families.py."""
    num_layers, flags = OF_CONVERTED[layout]
    source = hf_model("mixtral", config_num_hidden_layers=num_layers)
    model, data = tmp_path / "model", tmp_path / "data"
    assert convert(["from-hf", str(source), "--to", str(model)]) == 0
    data.mkdir()
    shutil.copy(model / "dict.txt", data / "dict.txt")
    run_ranks(write_ids, 1, str(data))
    own = train_converted(data, model, tmp_path / "own", 2, flags)
    alone = train_converted(data, model, tmp_path / "alone", *LAYOUTS["alone"])
    run_ranks(rewrite, 1, model, own, tmp_path / "rewritten")  # the same numbers, in one process's files
    rewritten = given_back(tmp_path / "rewritten" / LAST, "--companions", str(model / "hf"))
    back, alone_back = given_back(own), given_back(alone)
    for file in ("model.safetensors", "config.json"):
        assert (back / file).read_bytes() == (rewritten / file).read_bytes()
    before, found, expected = (
        load_file(folder / "model.safetensors") for folder in (source, back, alone_back)
    )
    assert found.keys() == before.keys() == expected.keys()
    for key, tensor in expected.items():
        assert not torch.equal(tensor, before[key]), key
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)
    assert convert(["from-hf", str(back), "--to", str(tmp_path / "again")]) == 0
    checkpoints = (own, tmp_path / "again" / "checkpoint.pt", alone, model / "checkpoint.pt")
    scores = [perplexity(eval_lm(data, path)) for path in checkpoints]
    assert scores[0] == scores[1] == pytest.approx(scores[2], rel=1e-4)
    assert scores[0] != scores[3]
