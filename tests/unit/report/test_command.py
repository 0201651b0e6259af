"""The command: its exit codes and sentences, and how it watches a run."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from matplotlib.image import imread

from fairseq_moe.errors import MoEError
from fairseq_moe.report.command import main
from fairseq_moe.report.writing import watch, write_report
from tests.helpers.reports import inner, parsed, write_run

DONE = "done training in 8.6 seconds\n"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def test_page_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path / "run"))]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "other.html")]) == 0
    assert parsed(tmp_path / "other.html").all("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "run"]  # nothing half written


def test_log_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "log").write_text(inner(2))
    assert main([str(tmp_path / "save"), "--log", str(tmp_path / "log")]) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere is not a directory"),
        (["."], "holds no line of fairseq's JSON log and no record of the experts' load"),
        ([".", "--log", "nothing"], "no log at nothing"),
        (["full", "--output", "missing/page.html"], "the page cannot be written to"),
        (["full", "--output", "."], "which is a directory; name a file in it"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_code_2(
    argv: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "full")
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("fairseq-moe-report: ") and said.count("\n") == 1 and words in said


@pytest.mark.parametrize("seconds", ["0", "x", "nan"])
def test_seconds_that_are_none_are_refused(seconds: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([".", "--watch", seconds])
    assert stop.value.code == 2


def test_watch_waits_writes_anew_and_ends_with_the_run(tmp_path: Path) -> None:
    """The run goes on whenever the page has been written: what is written then is what the next page must have."""
    log, seen = tmp_path / "train.jsonl", []

    def go_on(path: Path) -> None:
        page = parsed(path)
        refreshed = any(meta.get("http-equiv") == "refresh" for meta in page.all("meta"))
        seen.append((refreshed, log.read_text().count("num_updates")))
        if len(seen) < 4:
            with log.open("a") as file:
                file.write(f"{inner(2 * len(seen) + 2)}\n{DONE if len(seen) == 3 else ''}")

    log.write_text(f"{inner(2)}\n")
    assert watch(tmp_path, every_sec=0.05, told=go_on, idle_sec=60) == "Training has ended."
    assert seen == [(True, 1), (True, 2), (True, 3), (False, 4)]


def test_watch_ends_when_nothing_changes_for_long(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(inner(2))
    pages: list[Path] = []
    reason = watch(tmp_path, every_sec=0.05, told=pages.append, idle_sec=0.5)
    assert reason.startswith("Nothing has changed for ") and len(pages) == 1
    assert not any("http-equiv" in meta for meta in parsed(pages[0]).all("meta"))


def test_watch_of_a_run_that_never_writes_ends_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MoEError, match="holds no line"):
        watch(tmp_path, every_sec=0.05, told=lambda path: None, idle_sec=0.2)


def test_ctrl_c_ends_a_watch_in_peace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    (tmp_path / "train.jsonl").write_text(inner(2))
    assert main([str(tmp_path), "--watch", "1"]) == 0
    assert (tmp_path / "report.html").exists() and "stopped" in capsys.readouterr().out


def test_screenshot_in_a_browser(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium: 1 screenshot is not taken")
    page, picture = write_report(write_run(tmp_path / "run")), tmp_path / "page.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,2000", f"--screenshot={picture}"]
    subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True, timeout=100)
    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[:2] == (2000, 500)
    blue = abs(pixels - [0x3B / 255, 0x82 / 255, 0xF6 / 255]).max(-1) < 0.05  # the first line of a figure
    assert blue.sum() > 500
