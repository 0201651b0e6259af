"""A dense model does not notice the plugin: same numbers to the bit, same random draws, same files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.commands import BASE, DENSE, PLUGIN, eval_lm, json_lines, perplexity
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

_LM = [*DENSE, "--dropout", "0.1", "--clip-norm", "1.0", "--update-freq", "2"]
_TRANSLATION = [
    *(
        "--task",
        "translation",
        "--source-lang",
        "de",
        "--target-lang",
        "en",
        "--arch",
        "transformer_iwslt_de_en",
    ),
    *("--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32"),
    *("--decoder-layers", "2", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32"),
    *("--optimizer", "adam", "--lr", "0.01", "--clip-norm", "1.0", "--batch-size", "4", "--dropout", "0.1"),
    *(
        "--decoder-layerdrop",
        "0.5",
        "--criterion",
        "label_smoothed_cross_entropy",
        "--label-smoothing",
        "0.1",
    ),
]


def _train(data: Path, save_dir: Path, *flags: Any, plugin: bool, world_size: int = 1) -> CommandResult:
    argv = [data, *(PLUGIN if plugin else []), *BASE, "--distributed-backend", "gloo"]
    argv += ["--save-dir", save_dir, "--max-update", "3", *flags]
    result = run_cli(
        "tests.e2e.starts", ["fairseq_cli.train", *argv], function="then_draw", world_size=world_size
    )
    assert result.exit_code == 0, result.output[-3000:]
    return result


def _numbers(result: CommandResult) -> list[Any]:
    """Printed losses and norms, and what the random generators of every rank gave afterwards."""
    draws = [line for line in result.output.splitlines() if line.startswith("then drawn:")]
    assert len(draws) == len(result.outputs)
    records = json_lines(result, "train_inner") + json_lines(result, "valid")
    keys = ("loss", "gnorm", "ppl", "valid_loss", "valid_ppl")
    return [draws, *({key: record[key] for key in keys if key in record} for record in records)]


def _model(save_dir: Path, name: str = "checkpoint_last.pt") -> dict[str, torch.Tensor]:
    # Stock stores the namespace of translation models, which only full unpickling reads.
    return torch.load(save_dir / name, weights_only=False)["model"]


def _assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def parallel_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of sentences of random words, as fairseq-preprocess leaves them."""
    folder = tmp_path_factory.mktemp("parallel-data")
    run_ranks(_build_parallel_data, 1, str(folder))
    return folder


def _build_parallel_data(rank: int, folder: str) -> None:
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary()
    for word in range(30):
        dictionary.add_symbol(f"w{word}")
    generator = torch.Generator().manual_seed(0)
    for language in ("de", "en"):
        dictionary.save(f"{folder}/dict.{language}.txt")
        for split, num_sentences in (("train", 30), ("valid", 7)):
            prefix = f"{folder}/{split}.de-en.{language}"
            builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(dictionary))
            for length in torch.randint(3, 9, (num_sentences,), generator=generator).tolist():
                words = torch.randint(4, len(dictionary), (length,), generator=generator)
                builder.add_item(torch.cat([words, torch.tensor([dictionary.eos()])]).int())
            builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    ("kind", "world_size"), [("language model", 1), ("language model", 2), ("translation", 1)]
)
def test_training_is_the_same_to_the_bit(
    kind: str, world_size: int, text_data: Path, parallel_data: Path, tmp_path: Path
) -> None:
    data, flags = (text_data, _LM) if kind == "language model" else (parallel_data, _TRANSLATION)
    stock = _train(data, tmp_path / "stock", *flags, plugin=False, world_size=world_size)
    plugin = _train(data, tmp_path / "plugin", *flags, plugin=True, world_size=world_size)
    assert _numbers(plugin) == _numbers(stock)
    _assert_bit_equal(_model(tmp_path / "plugin"), _model(tmp_path / "stock"))


@pytest.mark.parametrize("plugin_first", [True, False])
def test_checkpoints_pass_between_stock_and_plugin(
    plugin_first: bool, text_data: Path, tmp_path: Path
) -> None:
    whole = _train(text_data, tmp_path / "whole", *_LM, plugin=plugin_first)
    _train(text_data, tmp_path / "parts", *_LM, "--max-update", "2", plugin=plugin_first)
    rest = _train(text_data, tmp_path / "parts", *_LM, plugin=not plugin_first)
    assert json_lines(rest, "train_inner")[-1]["loss"] == json_lines(whole, "train_inner")[-1]["loss"]
    _assert_bit_equal(_model(tmp_path / "parts"), _model(tmp_path / "whole"))


def test_evaluation_of_a_checkpoint_of_the_other_kind(text_data: Path, tmp_path: Path) -> None:
    _train(text_data, tmp_path, *_LM, plugin=True)
    with_plugin = eval_lm(text_data, tmp_path / "checkpoint_last.pt")
    without = eval_lm(text_data, tmp_path / "checkpoint_last.pt", plugin=False)
    assert perplexity(without) == perplexity(with_plugin)


@pytest.mark.parametrize(
    "flags",
    [(), ("--moe-freq", "2", "--alternate-decoder-ffn-embed-dim", "24")],
    ids=["dense", "pseudo-moe"],
)
def test_moe_cross_entropy_is_cross_entropy(flags: tuple[str, ...], text_data: Path, tmp_path: Path) -> None:
    stock = _train(text_data, tmp_path / "ce", *_LM, *flags, plugin=True)
    moe = _train(text_data, tmp_path / "moe", *_LM, *flags, "--criterion", "moe_cross_entropy", plugin=True)
    assert _numbers(moe) == _numbers(stock)
    _assert_bit_equal(_model(tmp_path / "moe"), _model(tmp_path / "ce"))
    assert {float(record["moe_gate_loss"]) for record in json_lines(moe, "train_inner")} == {0.0}
