"""scripts/bench_gpu.py measures every part, in small on CPU, where fairseq is and where it is not."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_cli

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
GPU_PARTS = ["ceilings", "layer", "routing", "kernels", "experts", "fp8", "optimizers"]


def bench_gpu(folder: Path, *parts: str, program: tuple[str, ...] = (str(SCRIPTS / "bench_gpu.py"),)) -> Any:
    """The figures of a run on CPU, whose table has a heading for each part."""
    flags = ["--device", "cpu", "--quick", "--only", *parts, "--json", str(folder / "figures.json")]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *program, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    found = json.loads((folder / "figures.json").read_text())["parts"]
    assert list(found) == list(parts)
    for name, rows in found.items():
        assert rows and f"## {name}: " in run.stdout
    return found


def assert_measured(parts: Any) -> None:
    assert parts["layer"][0]["MoE layer"] > 0 and parts["layer"][0]["transformers grouped_mm"] > 0
    assert all(isinstance(value, float) for row in parts["experts"] for value in list(row.values())[1:])
    for name, columns in {
        "ceilings": ("what",),
        "routing": ("ms", "host, ms"),
        "kernels": ("ms", "twin, ms", "TB/s"),
        "fp8": ("bf16 experts, ms", "FP8 experts (emulate), ms"),
        "optimizers": ("ms",),
    }.items():
        for row in parts[name]:
            assert all(row[column] for column in columns) and not isinstance(row[columns[-1]], dict), row
    assert len(parts["kernels"]) >= 15


@pytest.mark.slow
def test_bench_gpu_measures_every_part_without_a_gpu(tmp_path: Path) -> None:
    parts = bench_gpu(tmp_path, *GPU_PARTS)
    assert_measured(parts)
    assert any("stock Adam" in row["optimizer"] for row in parts["optimizers"])


@pytest.mark.slow
def test_bench_gpu_without_fairseq_measures_what_needs_none(tmp_path: Path) -> None:
    script = SCRIPTS / "bench_gpu.py"
    hidden = f"import runpy, sys; sys.modules['fairseq'] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    parts = bench_gpu(tmp_path, *GPU_PARTS, "training", program=("-c", hidden))
    assert_measured(parts)
    assert "fairseq is not installed" in parts["training"][0]["run"]


@pytest.mark.slow
def test_bench_gpu_trains(tmp_path: Path) -> None:
    (row,) = bench_gpu(tmp_path, "training")["training"]
    assert row["words/s"] > 0


@pytest.mark.slow
def test_every_training_run_of_bench_gpu_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = importlib.import_module("bench_gpu_training")
    for name, flags, *_ in bench.RUNS:
        arguments = [*bench.arguments_of(flags, is_small=True), "--max-update", "1"]
        result = run_cli("fairseq_cli.train", arguments)
        assert result.exit_code == 0, f"{name}: {result.output[-2000:]}"
        assert "done training" in result.output


def test_bench_gpu_counts_what_ran_on_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = importlib.import_module("bench_gpu_training")
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(key: str, device: Any, milliseconds: float, count: int, *, marked: bool = False) -> Any:
        times = {"self_device_time_total": 1000 * milliseconds, "is_user_annotation": marked}
        return SimpleNamespace(key=key, device_type=device, count=count, **times)

    events = [
        event("aten::mm", cpu, 6.0, 4),
        event("nvjet_tst_128x256", cuda, 6.0, 4),
        event("Optimizer.step#Adam.step", cuda, 9.0, 2, marked=True),
        event("_adam", cuda, 2.0, 8),
        event("void at::native::elementwise_kernel", cuda, 1.0, 2),
        event("cudaStreamSynchronize", cpu, 0.0, 6),
        event("cudaDeviceSynchronize", cpu, 0.0, 4),
    ]
    found = bench._groups(SimpleNamespace(key_averages=lambda: events))
    assert found == {  # of two updates
        "optimizer, ms": 1.0,
        "other, ms": 0.5,
        "products, ms": 3.0,
        "launches": 7,
        "host waits": 3,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what it needs")
def test_bench_gpu_without_a_gpu_says_so() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPTS / "bench_gpu.py"], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 2 and "this measures a GPU, and there is none" in run.stderr
