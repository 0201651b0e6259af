"""What the benchmarks share: one step's time and peak memory, and a record of the machine."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fairseq_moe

__all__ = ["environment", "peak_bytes", "timed_ms"]


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "clock": _clock(device).__name__,
        "device": str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fairseq_moe": fairseq_moe.__version__,
        },
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def timed_ms(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of one step, by ``clock``: see ``environment``.

    On CPU it is this process's CPU time while torch runs one thread: it equals wall time on an idle machine
    and leaves out the time that other processes take on a busy one.
    """
    clock = _clock(device)
    _synchronize(device)
    start_sec = clock()
    step()
    _synchronize(device)
    return 1000 * (clock() - start_sec)


def _clock(device: torch.device) -> Callable[[], float]:
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Peak memory of one step above the memory before it; on CPU resident memory, as Linux tells it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the step would find it resident
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
