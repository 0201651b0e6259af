"""R17: a sequence longer than the model's positions is skipped and counted, or an error, when data is loaded; the log
names the flag, and the sequence never reaches a step.

Only ``--sample-break-mode eos`` and ``complete_doc`` make such samples; the other modes cut.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import train_argv
from tests.helpers.ranks import CommandResult, run_cli, run_ranks

LIMIT = 32
MODEL = [
    "--sample-break-mode",
    "eos",
    "--max-epoch",
    1,
    "--max-update",
    0,
    "--batch-size",
    2,
    "--max-tokens",
    80,
]


def _write(rank: int, folder: str, splits: dict[str, list[int]]) -> None:
    """Splits of sentences of these many words."""
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary.load(str(Path(folder) / "dict.txt"))
    for split, lengths in splits.items():
        prefix = str(Path(folder) / split)
        builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(dictionary))
        for length in lengths:
            line = " ".join(dictionary[5 + index % 100] for index in range(length))
            builder.add_item(dictionary.encode_line(line, add_if_not_exist=False))
        builder.finalize(f"{prefix}.idx")


def _run(
    text_data: Path, tmp_path: Path, *flags: Any, world_size: int = 1, **splits: list[int]
) -> CommandResult:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(text_data / "dict.txt", folder)
    fits = [7, 20, LIMIT - 1, 5, 12]
    run_ranks(_write, 1, str(folder), {"train": fits, "valid": fits, **splits})
    argv = [*train_argv(folder, tmp_path / "save", *MODEL, *flags), "--no-save"]
    return run_cli("fairseq_cli.train", argv, world_size=world_size)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_long_training_sample_is_skipped_and_counted(place: str, text_data: Path, tmp_path: Path) -> None:
    lengths = [LIMIT, 7, 20, LIMIT - 1, 5]
    found = _run(text_data, tmp_path, train=lengths if place == "first" else lengths[::-1], world_size=2)
    assert found.exit_codes == [0, 0], found.output[-2000:]
    assert "1 samples have invalid sizes and will be skipped, max_positions=32" in found.output


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_long_validation_sample_is_an_error(place: str, text_data: Path, tmp_path: Path) -> None:
    lengths = [LIMIT, 7, 20]
    found = _run(text_data, tmp_path, valid=lengths if place == "first" else lengths[::-1])
    assert found.exit_code != 0
    assert "begin dry-run validation" in found.output and "begin training epoch" not in found.output
    assert "--skip-invalid-size-inputs-valid-test" in found.output
    assert "IndexError" not in found.output


def test_blocks_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    flags = ("--tokens-per-sample", 64, "--max-target-positions", LIMIT)
    found = run_cli("fairseq_cli.train", train_argv(tmp_path / "no data", tmp_path, *flags))
    assert found.exit_code == 2
    assert "--tokens-per-sample is 64, but --max-target-positions is 32" in found.output


def test_without_the_check_such_blocks_are_not_refused(text_data: Path, tmp_path: Path) -> None:
    argv = train_argv(text_data, tmp_path, "--tokens-per-sample", 64, "--max-target-positions", LIMIT)
    found = run_cli("tests.reliability.starts", ["block check", *argv], function="train_without")
    assert "--tokens-per-sample is 64" not in found.output
    assert found.exit_code != 2
