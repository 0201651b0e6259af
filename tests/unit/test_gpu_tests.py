"""The tests of tests/gpu run: in small, on CPU. They show nothing there but that they will not fail by themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_gpu_tests(*arguments: str, **variables: str) -> str:
    """Run tests/gpu but for the commands, whose starts take minutes."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_they_run_on_cpu() -> None:
    last = run_gpu_tests("--ignore", "tests/gpu/test_commands.py", FAIRSEQ_MOE_GPU_TESTS_ON="cpu")
    passed = re.match(r"(\d+) passed", last)
    assert passed is not None and int(passed[1]) > 300


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_without_a_gpu_they_are_counted() -> None:
    assert re.match(r"\d{3} skipped in", run_gpu_tests(FAIRSEQ_MOE_GPU_TESTS_ON=""))
