"""Every command of docs/launch.md is run as it stands there, one after the other in one directory."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import run_process
from tests.helpers.ranks import REPOSITORY, CommandResult

_PAGE = REPOSITORY / "docs" / "launch.md"


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, CommandResult]]:
    folder = tmp_path_factory.mktemp("launch")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = {}
    for command in commands():
        found[command] = run_process("env", f"PATH={path}", "bash", "-c", command, cwd=folder, timeout=240.0)
        assert found[command].exit_code == 0, f"{command}\n{found[command].output[-3000:]}"
    return folder, found


def _output(results: tuple[Path, dict[str, CommandResult]], word: str) -> str:
    (output,) = [found.output for command, found in results[1].items() if word in command]
    return output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_leads_to_a_plan_of_1024_ranks_and_a_run_with_its_report(
    results: tuple[Path, dict[str, CommandResult]],
) -> None:
    planned = _output(results, "DRY_RUN=1")
    assert "1024 x h100" in planned
    assert "\nFits: " in planned
    assert "#SBATCH --nodes=128" in planned
    built = _output(results, "DRY_RUN=2").partition("# built")[2]
    pairs = re.findall(r"^rank \d+ +([\d,]+) +([\d,]+)$", built, re.MULTILINE)
    assert len(pairs) == 4
    assert all(one == other for one, other in pairs)
    assert re.search(r"^ep +32 +command line$", _output(results, "--show-origin"), re.MULTILINE)
    (run_dir,) = (results[0] / "runs").iterdir()
    assert json.loads((run_dir / "measured.json").read_text())["updates"] == 30
    assert "<svg" in (run_dir / "report.html").read_text()
    assert "words/s" in _output(results, "--calibrate")
    table = re.search(r"## Run it(.*?)## Settings", _PAGE.read_text(), re.DOTALL)
    assert table is not None
    named = re.findall(r"`([\w.]+)/?`", "".join(re.findall(r"^\| (`.*?) \|", table[1], re.MULTILINE)))
    assert len(named) == 12
    assert [name for name in named if not (run_dir / name).exists()] == []
