"""What is read from logs: each form of a line, damage, runs that went back, and files that say the same."""

from pathlib import Path

from fairseq_moe.report.files import find_files
from fairseq_moe.report.log import Log, read_log
from tests.helpers.reports import inner

# As fairseq-train --log-file writes them, some numbers left out.
FILE = """{'_name': None, 'common': {'log_format': 'json'}}
{"epoch": 1, "update": 0.062, "loss": "7.999", "moe_gate_loss": "1.30604", "wps": "714", "num_updates": "2"}
Start iterating over samples
{"epoch": 1, "update": 0.125, "loss": "nan", "gnorm": "inf", "wps": "0", "num_updates": "4", "loss_scale": "None"}
{"epoch": 1, "valid_loss": "6.342", "valid_num_updates": "4", "valid_best_loss": "6.342"}
{"epoch": 1, "train_loss": "6.412", "train_train_wall": "4", "train_num_updates": "4"}
"""
OUTPUT = "2026-11-28 09:44:58 | INFO | train_inner | "
SKIPPED = (
    "2026-11-28 09:44:58 | INFO | fairseq.trainer | NOTE: gradient overflow detected, ignoring gradient, x\n"
)


def read(folder: Path, *texts: str) -> Log:
    paths = []
    for index, text in enumerate(texts):
        paths.append(folder / f"{index}.log")
        paths[-1].write_text(text)
    return read_log(paths, numbers=paths)


def updates(log: Log) -> list[int]:
    return [point.update for point in log.train]


def test_lines_of_a_log_file(tmp_path: Path) -> None:
    log = read(tmp_path, FILE)
    assert updates(log) == [2, 4]
    assert log.train[0].values["moe_gate_loss"] == 1.30604
    assert "loss_scale" not in log.train[1].values and log.train[1].values["gnorm"] == float("inf")
    assert {name: [(p.update, p.values["loss"]) for p in points] for name, points in log.splits.items()} == {
        "valid": [(4, 6.342)],
        "train": [(4, 6.412)],
    }
    assert list(log.validations) == ["valid"]
    assert (log.num_damaged, log.has_output, log.has_ended) == ({}, False, False)


def test_output_of_a_rank_tells_of_skipped_updates_and_of_the_end(tmp_path: Path) -> None:
    end = "2026-11-28 09:45:00 | INFO | fairseq_cli.train | done training in 8.6 seconds\n"
    log = read(tmp_path, f"{SKIPPED}{OUTPUT}{inner(2)}\n{SKIPPED}{SKIPPED}0: {OUTPUT}{inner(4)}\n{end}")
    assert (updates(log), log.skipped) == ([2, 4], [0, 2, 2])
    assert log.has_output and log.has_ended
    assert not read(tmp_path, f"{OUTPUT}{inner(2)}\n{end}{OUTPUT}{inner(4)}\n").has_ended  # it was continued


def test_numbers_too_large_and_lines_too_deep_end_nothing(tmp_path: Path) -> None:
    log = read(tmp_path, f'{{"num_updates": "2", "loss": 1{"0" * 400}}}\n{{"a": {"[" * 100_000}\n{inner(4)}')
    assert updates(log) == [2, 4]
    assert "loss" not in log.train[0].values
    assert list(log.num_damaged.values()) == [1]


def test_damaged_and_half_written_lines_are_counted(tmp_path: Path) -> None:
    half = inner(6)[:30]
    log = read(
        tmp_path, f'{inner(2)}\n{{"epoch": 1, "los{inner(3)}\n\x00\xff{inner(4)}\n[1]\n{{"a": 1}}\n{half}'
    )
    assert updates(log) == [2]
    assert list(log.num_damaged.values()) == [2]


def test_run_that_went_back_counts_what_came_later(tmp_path: Path) -> None:
    lines = [inner(update, loss=1) for update in (2, 4, 6)] + [inner(update, loss=2) for update in (4, 6, 8)]
    in_one = read(tmp_path, "\n".join(lines))
    in_two = read(tmp_path, "\n".join(lines[:3]), "\n".join(lines[3:]))
    for log in (in_one, in_two):
        assert [(point.update, point.values["loss"]) for point in log.train] == [
            (2, 1),
            (4, 2),
            (6, 2),
            (8, 2),
        ]


def test_files_that_say_the_same_count_once(tmp_path: Path) -> None:
    text = f"{OUTPUT}{inner(2)}\n{SKIPPED}{OUTPUT}{inner(4)}\n"
    log = read(tmp_path, text, text)
    assert (updates(log), log.skipped) == ([2, 4], [2])


def test_numbers_are_those_of_train_jsonl_where_there_is_one(tmp_path: Path) -> None:
    """The output of a rank may begin anywhere; its words count, its numbers are there already."""
    (tmp_path / "train.jsonl").write_text("\n".join(map(inner, (2, 4, 6))))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").write_text(f"{OUTPUT}{inner(4)}\n{SKIPPED}")
    files = find_files(tmp_path)
    log = read_log(files.logs, numbers=files.numbers)
    assert (updates(log), log.skipped) == ([2, 4, 6], [4])
