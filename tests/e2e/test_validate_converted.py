"""fairseq-validate right after conversion: the loss that transformers has, or one sentence where no data is."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.convert import from_hf
from tests.e2e.commands import PLUGIN, json_lines
from tests.helpers.hf import import_transformers
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

_EOS = 2
_ITEMS = [5, 9, 17, 4, 1, 60, 3, 0, 33, 8, _EOS]


@pytest.fixture(scope="module")
def source(hf_model: Callable[..., Path]) -> Path:
    return hf_model("mixtral")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    from_hf(source, folder)
    return folder


def _write_ids(rank: int, prefix: str, items: list[int]) -> None:
    from fairseq.data import indexed_dataset

    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=97)
    builder.add_item(torch.tensor(items))
    builder.finalize(f"{prefix}.idx")


def _validate(data: Path, model: Path, *flags: Any, world_size: int = 1) -> CommandResult:
    argv = [
        data,
        *PLUGIN,
        "--cpu",
        "--num-workers",
        "0",
        "--path",
        model / "checkpoint.pt",
        "--log-format",
        "json",
    ]
    argv += ["--task", "language_modeling", "--valid-subset", "valid", "--batch-size", "1"]
    argv += ["--required-batch-size-multiple", "1", *flags]
    return run_cli("fairseq_cli.validate", argv, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_is_that_of_transformers(world_size: int, source: Path, converted: Path, tmp_path: Path) -> None:
    shutil.copy(converted / "dict.txt", tmp_path / "dict.txt")
    run_ranks(_write_ids, 1, str(tmp_path / "valid"), _ITEMS)
    result = _validate(tmp_path, converted, world_size=world_size)
    assert result.exit_code == 0, result.output[-3000:]
    (record,) = json_lines(result, "valid")
    model = import_transformers().AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[_EOS, *_ITEMS[:-1]]])).logits[0]
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(_ITEMS))) / math.log(2)
    assert float(record["valid_inner_loss"]) == pytest.approx(expected, abs=2e-3)


def test_directory_without_data_is_one_sentence(converted: Path) -> None:
    result = _validate(converted, converted)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output[-3000:]
    (sentence,) = re.findall(r"^fairseq_moe: error: (.*\.)$", result.output, flags=re.MULTILINE)
    assert str(converted / "valid") in sentence and "fairseq-moe-convert preprocess" in sentence
