"""`python -m fairseq_moe.inspect`: numbers, table, picture, warnings and error sentences."""

import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_moe.errors import MoEError
from fairseq_moe.expert_load.command import main
from fairseq_moe.expert_load.record import LoadRecord, append_record
from fairseq_moe.expert_load.summary import LayerLoad, history, layer_loads, select, warnings_of

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

PNG_MAGIC = b"\x89PNG\r\n"


class _Without:
    """An importer that answers as if the library were not installed."""

    def __init__(self, library: str) -> None:
        self.library = library

    def find_spec(self, name: str, *args: object) -> None:
        if name == self.library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def record(update: int = 10, split: str = "train", num_experts: int = 4) -> LoadRecord:
    """Layer 1: one dead, one overloaded expert, half of the latter's tokens dropped. Layer 3: balanced."""
    idle = [0] * (num_experts - 3)
    return LoadRecord(
        split=split,
        update=update,
        layers=[1, 3],
        wanted=[[60, 20, 20, *idle], [25] * num_experts],
        kept=[[30, 20, 20, *idle], [25] * num_experts],
    )


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    for update in (10, 20, 30):
        append_record(tmp_path, record(update))
    append_record(tmp_path, record(30, split="valid"))
    return tmp_path


def test_numbers_of_a_layer() -> None:
    uneven, even = layer_loads(record())

    assert uneven.shares == [0.6, 0.2, 0.2, 0.0]
    assert uneven.max_over_mean == pytest.approx(2.4)
    assert uneven.drop_frac == pytest.approx(0.3)
    assert uneven.dead == [3]
    assert uneven.overloaded(2.0) == [0]
    assert (even.max_over_mean, even.drop_frac, even.dead, even.overloaded(2.0)) == (1.0, 0.0, [], [])


def test_a_layer_without_tokens_gives_zeros_and_no_warning() -> None:
    idle = LayerLoad(layer=1, wanted=[0, 0], kept=[0, 0])

    assert (idle.shares, idle.max_over_mean, idle.drop_frac) == ([0.0, 0.0], 0.0, 0.0)
    assert warnings_of([idle], overloaded_above=2.0) == []


def test_warnings_name_layer_experts_and_threshold() -> None:
    assert warnings_of(layer_loads(record()), overloaded_above=2.0) == [
        "layer 1: dead expert 3, no token asked for a place there.",
        "layer 1: overloaded expert 0, more than 2 times the mean load.",
    ]
    assert warnings_of(layer_loads(record(num_experts=16)), overloaded_above=9.0)[0] == (
        "layer 1: dead experts 3, 4, 5, 6, 7, 8, 9, 10 and 5 more, no token asked for a place there."
    )


def test_history_of_a_run_that_went_back_keeps_the_later_lines() -> None:
    updates = [10, 20, 30, 20, 30, 40]

    assert [each.update for each in history(map(record, updates), split="train")] == [10, 20, 30, 40]
    assert history(map(record, updates), split="valid") == []


def test_the_default_record_is_the_last_validation() -> None:
    records = [record(10), record(10, split="valid"), record(20)]

    assert select(records, split=None, update=None, where="x") is records[1]
    assert select(records[:1], split=None, update=None, where="x") is records[0]
    assert select(records, split="train", update=10, where="x") is records[0]


def test_a_record_that_is_not_there_is_answered_with_what_there_is() -> None:
    records = [record(10), record(20)]

    with pytest.raises(MoEError, match="x has no record of split 'valid', only of train; choose one"):
        select(records, split="valid", update=None, where="x")
    with pytest.raises(
        MoEError, match="no train record of update 18, but 2 of updates 10 to 20; the nearest is 20"
    ):
        select(records, split="train", update=18, where="x")
    with pytest.raises(MoEError, match="x holds no record yet"):
        select([], split=None, update=None, where="x")


def test_the_table_shows_shares_drops_and_warnings(
    save_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(save_dir)]) == 0

    out = capsys.readouterr().out
    assert "Load of 4 experts in 2 layers, valid, update 30: 100 assignments per layer" in out
    assert [line.split() for line in out.splitlines() if line.lstrip().startswith(("1 ", "3 "))] == [
        ["1", "60.0", "20.0", "20.0", "0.0", "30.0", "2.40"],
        ["3", "25.0", "25.0", "25.0", "25.0", "0.0", "1.00"],
    ]
    assert "WARNING layer 1: dead expert 3, no token asked for a place there." in out


def test_many_experts_become_a_strip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_record(tmp_path, record(num_experts=64))

    assert main([str(tmp_path)]) == 0

    strips = [
        line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("3 ")
    ]
    assert strips[0][0] == "3"
    assert set(strips[0][1]) == {"+"}


def test_balanced_experts_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_record(tmp_path, LoadRecord(split="valid", update=1, layers=[0], wanted=[[5, 5]], kept=[[5, 5]]))

    assert main([str(tmp_path)]) == 0
    assert "no dead and no overloaded experts" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--split", "train"], ["--update", "10", "--split", "train"]])
def test_the_picture_is_a_png(save_dir: Path, tmp_path: Path, arguments: list[str]) -> None:
    png = tmp_path / "load.png"

    assert main([str(save_dir), "--png", str(png), *arguments]) == 0
    assert png.read_bytes().startswith(PNG_MAGIC)


def test_errors_are_one_sentence_and_exit_code_1(
    save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "no load record at"),
        ([str(save_dir), "--update", "11"], "no valid record of update 11"),
        ([str(save_dir), "--png", str(tmp_path / "no" / "load.png")], "the picture cannot be written to"),
        ([str(save_dir), "--png", str(tmp_path / "load.xyz")], "the picture cannot be written to"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("fairseq_moe.inspect: ")
        assert error.count("\n") == 1


def test_wrong_flags_exit_with_2(save_dir: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(save_dir), "--update", "soon"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(("library", "module"), [("rich", "table"), ("matplotlib", "plot")])
def test_a_missing_extra_is_named_with_its_cure(
    save_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    module: str,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"fairseq_moe.expert_load.{module}", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without(library), *sys.meta_path])

    assert main([str(save_dir), "--png", str(tmp_path / "load.png")]) == 1
    assert (
        f"this needs {library}; install it with: pip install 'fairseq_moe[inspect]'"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_it_runs_as_a_module(save_dir: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fairseq_moe.inspect", str(save_dir)],
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert run.returncode == 0, run.stderr
    assert "Load of 4 experts" in run.stdout
