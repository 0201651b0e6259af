"""Every kernel compiles to machine code of a GPU, on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

from tests.unit.fused.signatures import CALLS, kernels

ROOT = Path(__file__).resolve().parents[3]


def test_every_kernel_is_listed() -> None:
    assert {name for name, _ in kernels()} == set(CALLS)


def run_compiler(module: str, cache: Path) -> str:
    """Run a program that compiles kernels, and return the last line that it prints."""
    # In an interpreter of its own: kernels are interpreted here. With a cache of its own, so that none is left out.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.unit.fused.{module}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def test_every_kernel_compiles(tmp_path: Path) -> None:
    assert run_compiler("signatures", tmp_path) == "all compile"


def test_grouped_products_as_launched_use_tensor_cores_and_spill_nothing(tmp_path: Path) -> None:
    assert run_compiler("grouped_launches", tmp_path) == "all as expected"
