"""preprocess killed, a worker or all of it, at every step of a piece; the same command then ends as if never."""

import re
import time
from pathlib import Path

import pytest

from fairseq_moe.faults import VARIABLE
from tests.helpers.byte_tokenizer import reference_data, write_byte_model
from tests.helpers.ranks import CommandResult, run_cli

LINE = "Whether 'tis nobler in the mind to suffer"
NUM_LINES = 240  # 11 kB: three pieces of 4 KiB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"), [LINE])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("".join(f"{LINE} {number}\n" for number in range(NUM_LINES)))
    return path


@pytest.fixture(scope="module")
def expected(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return reference_data(model, [text], tmp_path_factory.mktemp("expected") / "train")


def _preprocess(
    model: Path, text: Path, data: Path, fault: str | None = None, workers: int = 1
) -> CommandResult:
    argv = ["preprocess", model, "--trainpref", text, "--destdir", data, "--workers", workers]
    env = {} if fault is None else {VARIABLE: fault}
    return run_cli(
        "tests.reliability.starts", argv, env=env, may_die=True, function="convert_in_small_pieces"
    )


def _num_finished(data: Path) -> int:
    """Count the parts that are complete."""
    return len(list(Path(f"{data}.parts").glob("*.part")))


def _check_resumed(
    model: Path, text: Path, data: Path, expected: tuple[bytes, bytes], *, num_finished: int
) -> None:
    assert _num_finished(data) == num_finished
    assert not data.exists()
    resumed = _preprocess(model, text, data, workers=2)
    assert resumed.exit_code == 0, resumed.output[-3000:]
    said = re.findall(r"note: (\d+) of 3 pieces were finished by an earlier run", resumed.output)
    assert said == ([str(num_finished)] if num_finished else [])
    assert ((data / "train.bin").read_bytes(), (data / "train.idx").read_bytes()) == expected
    assert not Path(f"{data}.parts").exists()


@pytest.mark.parametrize(
    ("point", "num_finished"),
    [
        ("save.part_opened", 1),
        ("save.part_half", 1),
        ("save.part_written", 1),
        ("save.part_flushed", 1),
        ("save.part_renamed", 2),
    ],
)
def test_a_killed_worker_is_one_sentence_and_its_piece_is_all_that_is_lost(
    point: str,
    num_finished: int,
    model: Path,
    text: Path,
    expected: tuple[bytes, bytes],
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    killed = _preprocess(model, text, data, f"{point}@0@2=kill")
    assert killed.exit_code == 2 and "Traceback" not in killed.output, killed.output[-3000:]
    place = rf"a worker was killed by SIGKILL at bytes \d+ to \d+ of {re.escape(str(text))}"
    assert re.search(rf"^fairseq_moe.convert: {place}.* goes on from them\.$", killed.output, re.MULTILINE)
    _check_resumed(model, text, data, expected, num_finished=num_finished)


def test_a_killed_command_goes_on_from_its_finished_pieces(
    model: Path, text: Path, expected: tuple[bytes, bytes], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    killed = _preprocess(model, text, data, "save.part_known@0@1=kill")
    assert killed.exit_code == -9
    # The worker has got the second piece already, and ends by itself when that is done.
    deadline = time.monotonic() + 60
    while _num_finished(data) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    _check_resumed(model, text, data, expected, num_finished=2)


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    model: Path, text: Path, expected: tuple[bytes, bytes], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    full = _preprocess(model, text, data, "save.part_half@0@2=enospc")
    assert full.exit_code == 2 and "Traceback" not in full.output, full.output[-3000:]
    assert "train-000001.part (No space left on device) for bytes " in full.output
    assert not list(Path(f"{data}.parts").glob("*.tmp-*"))
    _check_resumed(model, text, data, expected, num_finished=1)
