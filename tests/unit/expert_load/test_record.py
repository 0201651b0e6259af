"""The record of the experts' load: what is written is read, whatever happened to the writer."""

from pathlib import Path

import pytest
import torch

from fairseq_moe.errors import MoEError
from fairseq_moe.expert_load.record import RECORD_NAME, LoadRecord, append_record, read_records


def record(update: int = 10, split: str = "train") -> LoadRecord:
    return LoadRecord(
        split=split, update=update, layers=[1, 3], wanted=[[3, 1], [2, 2]], kept=[[2, 1], [2, 2]]
    )


def test_written_records_are_read_in_order(tmp_path: Path) -> None:
    append_record(tmp_path, record(10))
    append_record(tmp_path, record(20, split="valid"))

    assert list(read_records(tmp_path)) == [record(10), record(20, split="valid")]
    assert list(read_records(tmp_path / RECORD_NAME)) == list(read_records(tmp_path))


def test_a_missing_save_directory_is_made(tmp_path: Path) -> None:
    append_record(tmp_path / "a" / "b", record())

    assert list(read_records(tmp_path / "a" / "b")) == [record()]


def test_counts_come_from_a_summed_float_tensor() -> None:
    load = torch.tensor([[[3.0, 1.0], [2.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]])

    assert LoadRecord.from_load(load, split="train", update=10, layers=[1, 3]) == record()


def test_large_counts_are_exact() -> None:
    load = torch.tensor([[[2.0**24, 0.0], [2.0**24, 0.0]]])

    assert LoadRecord.from_load(load, split="valid", update=1, layers=[0]).wanted == [[2**24, 0]]


@pytest.mark.parametrize("length", [1, 40, 200_000])
def test_an_unfinished_last_line_is_left_out_and_cut_off_by_the_next_write(
    tmp_path: Path, length: int
) -> None:
    append_record(tmp_path, record(10))
    with (tmp_path / RECORD_NAME).open("a") as file:
        file.write('{"version": 1, "split": "train"'.ljust(length)[:length])

    assert list(read_records(tmp_path)) == [record(10)]
    append_record(tmp_path, record(20))
    assert list(read_records(tmp_path)) == [record(10), record(20)]


def test_a_file_with_nothing_but_an_unfinished_line_starts_again(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text('{"version"')

    assert list(read_records(tmp_path)) == []
    append_record(tmp_path, record())
    assert list(read_records(tmp_path)) == [record()]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "split": "train", "update": 1, "layers": [1], "wanted": [[1]], "kept": [[1, 2]]}',
        '{"version": 1, "split": "train", "update": 1, "layers": [1, 2], "wanted": [[1]], "kept": [[1]]}',
        '{"version": 1, "split": "train", "update": 1, "layers": [], "wanted": [], "kept": []}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    append_record(tmp_path, record())
    with (tmp_path / RECORD_NAME).open("a") as file:
        file.write(line + "\n")
    append_record(tmp_path, record())

    with pytest.raises(MoEError, match=r"moe_load\.jsonl line 2 is not a load record; delete that line"):
        list(read_records(tmp_path))


def test_a_newer_version_is_refused_by_number_even_with_unknown_fields(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text('{"version": 7, "unknown": 1}\n')

    with pytest.raises(MoEError, match="line 1 has version 7, expected 1; update fairseq_moe"):
        list(read_records(tmp_path))


def test_no_record_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(MoEError, match=r"no load record at .*; train with --criterion moe_cross_entropy"):
        list(read_records(tmp_path))
