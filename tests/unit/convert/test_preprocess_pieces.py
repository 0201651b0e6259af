"""preprocess in pieces: the bytes of one process for any number of workers and size of pieces; what goes wrong."""

import multiprocessing.util
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from fairseq_moe import progress as progress_module
from fairseq_moe.convert.cli import main
from fairseq_moe.convert.preprocess import preprocess
from fairseq_moe.convert.text.parts import own_parts
from fairseq_moe.convert.text.pieces import cut, fitting_piece_bytes
from fairseq_moe.convert.text.workers import Workers
from fairseq_moe.errors import ConfigError, MoEError
from tests.helpers.byte_tokenizer import reference_data, write_byte_model

LINE = "To be, or not to be: that is the question; h\u00f6her, \u4e16\u754c.\r"
# Empty lines at the beginning, inside and at the end; no end of the last line; nothing but an end; nothing.
TEXTS = [f"\n\n{LINE}\n\n{LINE * 9}\n" + f"{LINE}\n" * 30 + "\n", f"{LINE}\nlast", "\n", "", "one"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"), [LINE])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / str(number)).write_bytes(text.encode())
    return [folder / str(number) for number in range(len(TEXTS))]


def _bytes(data: Path, split: str) -> tuple[bytes, bytes]:
    return (data / f"{split}.bin").read_bytes(), (data / f"{split}.idx").read_bytes()


@pytest.mark.parametrize(("num_workers", "piece_bytes"), [(1, None), (1, 7), (2, 1), (3, 61), (2, 500)])
def test_every_way_writes_the_bytes_of_one_process(
    num_workers: int, piece_bytes: int | None, model: Path, texts: list[Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    splits = {"train": texts, "valid": texts[3:4], "test": texts[:1]}
    preprocess(model, data, splits, num_workers=num_workers, piece_bytes=piece_bytes)
    for split, paths in splits.items():
        assert _bytes(data, split) == reference_data(model, paths, tmp_path / split), split
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["data"]


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 61, 500, 10**6])
def test_pieces_are_whole_lines_and_all_of_the_file(piece_bytes: int, texts: list[Path]) -> None:
    found = cut({"train": texts}, piece_bytes)["train"]
    assert len({piece.name for piece in found}) == len(found)
    for path in texts:
        pieces = [path.read_bytes()[piece.start : piece.end] for piece in found if piece.path == path]
        assert b"".join(pieces) == path.read_bytes()
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])
        assert all(piece[:-1].count(b"\n", piece_bytes - 1) == 0 for piece in pieces), "cut at the first end"


def test_a_little_more_text_keeps_the_size_of_pieces() -> None:
    assert fitting_piece_bytes(10**8) == fitting_piece_bytes(10**8 + 10**6) == 1 << 20
    assert fitting_piece_bytes(10**9) == 1 << 23
    assert fitting_piece_bytes(10**13) == 1 << 25


def test_the_command_takes_several_files_and_shows_how_far_it_is(
    model: Path,
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress_module, "_LINE_EVERY_SEC", 0.0)
    files = ["--trainpref", str(texts[0]), str(texts[1]), "--trainpref", str(texts[2])]
    assert (
        main(["preprocess", str(model), *files, "--destdir", str(tmp_path / "data"), "--workers", "2"]) == 0
    )
    assert _bytes(tmp_path / "data", "train") == reference_data(model, texts[:3], tmp_path / "train")
    assert "encoding: 0.0 of 0.0 GB" in capsys.readouterr().err


def test_progress_counts_every_byte_of_the_text(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, list[int]] = {}

    @contextmanager
    def counting(label: str, total_bytes: int) -> Iterator[object]:
        shown[label] = [total_bytes]
        yield shown[label].append

    monkeypatch.setattr("fairseq_moe.convert.preprocess.progress", counting)
    preprocess(model, tmp_path / "data", {"train": texts}, num_workers=2, piece_bytes=50)
    total, *steps = shown["encoding"]
    assert total == sum(steps) == sum(path.stat().st_size for path in texts)
    assert len(steps) > 10


def _error(model: Path, data: Path, *paths: Path) -> str:
    with pytest.raises(MoEError) as caught:
        preprocess(model, data, {"train": paths}, num_workers=2, piece_bytes=50)
    assert not data.exists()
    return str(caught.value)


def test_what_is_not_utf8_is_named_with_its_line_and_byte(
    model: Path, texts: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "bad").write_bytes(b"abcdefghi\n" * 20 + b"abc\xff\n" + b"abcdefghi\n" * 20)
    said = _error(model, tmp_path / "data", texts[0], tmp_path / "bad")
    assert f"cannot read the text {tmp_path / 'bad'} as UTF-8: line 21, byte 203 (invalid start byte)" in said
    assert f"finished pieces are kept in {tmp_path / 'data.parts'}" in said


def test_all_files_that_cannot_be_read_are_named_at_once(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError) as caught:
        preprocess(model, tmp_path / "data", {"train": [tmp_path / "absent"], "test": [tmp_path / "pipe"]})
    assert len(caught.value.problems) == 2
    assert "No such file" in caught.value.problems[0] and "no regular file" in caught.value.problems[1]
    assert not (tmp_path / "data.parts").exists()


def test_a_piece_of_other_text_or_settings_or_damaged_is_made_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, bad, data = tmp_path / "text", tmp_path / "bad", tmp_path / "data"
    text.write_text("abcdefghi\n" * 20)
    bad.write_bytes(b"\xff\n")
    _error(model, data, text, bad)
    finished = sorted(path.name for path in (tmp_path / "data.parts").glob("*.part"))
    assert finished  # the last piece is the bad one

    def resumed(**settings: bool) -> str:
        capsys.readouterr()
        with pytest.raises(MoEError):
            preprocess(model, data, {"train": [text, bad]}, num_workers=1, piece_bytes=50, **settings)
        return capsys.readouterr().err

    assert "4 of 5 pieces were finished by an earlier run" in resumed() + resumed()
    part = tmp_path / "data.parts" / "train-000001.part"
    part.write_bytes(part.read_bytes()[:-3])
    assert "pieces that are made again: 1 (train-000001 does not agree, it is damaged)" in resumed()
    assert (
        "pieces that are made again: 4 (train-000000 does not agree, its beginning and end tokens was [[], [1]]"
        in (resumed(prepend_bos=True))
    )
    assert "4 of 5 pieces" in resumed(prepend_bos=True)
    text.write_text("ihgfedcba\n" * 20)
    assert "its text's time of change was" in resumed(prepend_bos=True)
    bad.write_text("good\n")
    preprocess(model, data, {"train": [text, bad]}, num_workers=1, piece_bytes=50)
    assert _bytes(data, "train") == reference_data(model, [text, bad], tmp_path / "train")


def test_text_that_changes_while_it_is_read_is_refused(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(texts: dict[str, list[Path]], piece_bytes: int | None) -> object:
        pieces = cut(texts, piece_bytes)
        with (tmp_path / "text").open("a") as file:
            file.write("more\n")
        return pieces

    monkeypatch.setattr("fairseq_moe.convert.preprocess.cut", changing)
    (tmp_path / "text").write_text("some\n")
    assert "was changed while it was read" in _error(model, tmp_path / "data", tmp_path / "text")


def test_a_directory_of_someone_else_and_a_second_run_are_left_alone(
    model: Path, texts: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "data.parts").mkdir()
    (tmp_path / "data.parts" / "thesis.tex").write_text("mine")
    assert "holds thesis.tex, which is none" in _error(model, tmp_path / "data", *texts)
    (tmp_path / "data.parts" / "thesis.tex").unlink()
    ready, hold = os.pipe(), os.pipe()
    child = os.fork()  # the lock is one between processes
    if child == 0:
        with own_parts(tmp_path / "data.parts", None):  # type: ignore[arg-type]
            os.write(ready[1], b"x")
            os.read(hold[0], 1)
    os.read(ready[0], 1)
    try:
        assert "another process is writing into" in _error(model, tmp_path / "data", *texts)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    preprocess(model, tmp_path / "data", {"train": texts}, num_workers=1)


def test_a_signal_keeps_what_is_finished(
    model: Path,
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["preprocess", str(model), "--trainpref", *map(str, texts), "--destdir", str(tmp_path / "data")]
    monkeypatch.setattr(
        "fairseq_moe.convert.preprocess.fault", lambda point: signal.raise_signal(signal.SIGTERM)
    )
    assert main(command) == 128 + signal.SIGTERM
    assert (
        "no incomplete directory is left, and the same command goes on from the pieces"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "data").exists()
    assert list((tmp_path / "data.parts").glob("*.part"))
    monkeypatch.undo()
    assert main(command) == 0
    assert _bytes(tmp_path / "data", "train") == reference_data(model, texts, tmp_path / "train")


def test_a_start_that_fails_leaves_no_worker_that_the_interpreter_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starter = os.fork()
    if starter == 0:
        start, started = ForkProcess.start, list[ForkProcess]()

        def only_one(process: ForkProcess) -> None:
            if started:
                raise OSError("no more processes")
            started.append(process)
            start(process)

        monkeypatch.setattr(ForkProcess, "start", only_one)
        workers = Workers(2, print)
        with suppress(OSError), workers:
            pass
        multiprocessing.util._exit_function()  # as an interpreter that ends
        os._exit(0)
    ended, deadline = (0, 0), time.monotonic() + 30
    while ended == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
        ended = os.waitpid(starter, os.WNOHANG)
    if ended == (0, 0):
        os.kill(starter, signal.SIGKILL)  # its worker then ends by itself
        os.waitpid(starter, 0)
    assert ended == (starter, 0)
