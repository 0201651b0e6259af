"""Loads are thinned out evenly, taken back where a run went back, and of one model only."""

from pathlib import Path

import pytest

from fairseq_moe.report import loads
from fairseq_moe.report.loads import read_loads
from tests.helpers.reports import load_line


def updates(folder: Path, *lines: str) -> tuple[list[int], list[str], int]:
    path = folder / "moe_load.jsonl"
    path.write_text("\n".join(lines))
    records, notes, num_damaged = read_loads(path)
    return [record.update for record in records], notes, num_damaged


def line(update: int, split: str = "train", num_experts: int = 2) -> str:
    return load_line(update, [[1] * num_experts], split=split)


def test_few_are_all_there(tmp_path: Path) -> None:
    assert updates(tmp_path, line(2), line(3, "valid"), line(4)) == ([2, 4], [], 0)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(4, [1, 2, 3, 4]), (5, [1, 3, 5]), (8, [1, 3, 5, 7, 8]), (9, [1, 5, 9]), (12, [1, 5, 9, 12])],
)
def test_many_are_thinned_out_evenly(
    number: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "MAX_RECORDS", 4)
    found, notes, _ = updates(tmp_path, *(line(update) for update in range(1, number + 1)))
    assert found == expected
    step = {4: 1, 5: 2, 8: 2}.get(number, 4)
    assert notes == ([] if step == 1 else [f"One record of {step} is shown, and the last one."])


def test_run_that_went_back(tmp_path: Path) -> None:
    assert updates(tmp_path, line(2), line(4), line(6), line(4), line(5))[0] == [2, 4, 5]


def test_another_model_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    found, [note], _ = updates(tmp_path, line(2), line(4), line(6, num_experts=3), line(8, num_experts=3))
    assert found == [6, 8] and note.startswith("2 earlier records of other layers")


def test_validation_serves_where_training_wrote_nothing(tmp_path: Path) -> None:
    found, [note], _ = updates(tmp_path, line(5, "valid"))
    assert found == [5] and "those of validation" in note


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    assert updates(tmp_path, line(2), "", '{"version": 1}', "x", line(4)[:40]) == ([2], [], 4)
    assert updates(tmp_path, "x") == ([], [], 1)
