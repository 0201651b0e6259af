"""Hold each script to the byte; ``python -m tests.unit.launch.test_golden_scripts`` writes them anew."""

import ast
import subprocess
from pathlib import Path

import pytest

from fairseq_moe.launch import render as render_package
from fairseq_moe.launch.render import render
from tests.helpers.jobs import golden_jobs

GOLDEN = Path(__file__).parent / "golden"
JOBS = golden_jobs()


def test_there_is_a_golden_script_of_each_job() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sh")} == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_written_down_as_its_golden_script(name: str) -> None:
    assert render(JOBS[name]) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("name", JOBS)
def test_bash_accepts_the_script_and_what_ranks_run(name: str) -> None:
    text = render(JOBS[name])
    _check(text)
    inner = text.partition("bash -c '")[2].partition("' rank")[0]
    assert bool(inner) is (
        (name.endswith("-nsys") and "local" not in name) or name.startswith(("sbatch-p", "sbatch-a"))
    )
    _check(inner)


def _check(text: str) -> None:
    found = subprocess.run(
        ["bash", "-n"], input=text, text=True, capture_output=True, timeout=60, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    "path", sorted(Path(str(render_package.__file__)).parent.glob("*.py")), ids=lambda p: p.stem
)
def test_rendering_reads_and_writes_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules <= {"re", "shlex"}
    calls = {
        ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    assert not calls & {
        "open",
        "read_text",
        "write_text",
        "exists",
        "resolve",
        "cwd",
        "print",
        "run",
        "getenv",
    }


if __name__ == "__main__":
    for name, job in JOBS.items():
        (GOLDEN / f"{name}.sh").write_text(render(job))
