"""Time and memory of the MoE layer, forward and backward, beside what it could cost at best.

    python scripts/bench_layer.py [--device cuda] [--json FILE]

Three ways to spend the same floating-point operations on T tokens, K experts each:

- dense limit: T * K rows through one feed-forward network, that is, two plain matrix products;
- MoE layer: ours, on one rank: routing, permutation, E experts, combination, balance loss, statistics;
- expert loop: the usual textbook code: for each expert, find its tokens, apply it, add its outputs up.

The rounds of the three are interleaved and the median of each is taken, so that other work on the machine
disturbs all alike. Time on CPU is this process's CPU time while torch runs one thread: it equals wall time on
an idle machine and leaves out the time that other processes take on a busy one. Memory is the peak during one
forward and backward pass above what was there before it, so it holds activations and gradients.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fairseq_moe
from fairseq_moe.modules import Dispatcher, Experts, MoELayer, Router, RouterConfig, RouterMode
from fairseq_moe.modules.exchange import LocalExchange
from fairseq_moe.modules.routing import SecondExpertPolicy

TOP_K = 2
MIB = 1024 * 1024


@dataclass(frozen=True)
class Size:
    """One measured shape.

    Args:
        tokens: T.
        model_dim: D.
        hidden_dim: F, of one expert.
        experts: E.
    """

    tokens: int
    model_dim: int
    hidden_dim: int
    experts: int


SIZES = {
    "cpu": (
        Size(1024, 128, 512, 8),
        Size(2048, 256, 1024, 8),
        Size(2048, 512, 2048, 8),
        Size(2048, 512, 2048, 32),
        Size(4096, 512, 2048, 64),
    ),
    "cuda": (
        Size(8192, 1024, 4096, 8),
        Size(8192, 2048, 8192, 8),
        Size(16384, 2048, 8192, 64),
    ),
}


def dense_limit(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """One network; each token passes K times."""
    network = nn.Sequential(
        nn.Linear(size.model_dim, size.hidden_dim), nn.GELU(), nn.Linear(size.hidden_dim, size.model_dim)
    )
    return network, lambda x_TD: network(x_TD.repeat(TOP_K, 1)).sum()


def our_layer(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The layer as a decoder uses it, with the balance loss."""
    layer = MoELayer(
        router=Router(
            model_dim=size.model_dim,
            num_experts=size.experts,
            config=RouterConfig(gating_use_fp32=True, second_expert_policy=SecondExpertPolicy.ALL),
        ),
        experts=Experts(
            num_local_experts=size.experts,
            first_expert_id=0,
            model_dim=size.model_dim,
            hidden_dim=size.hidden_dim,
            activation=F.gelu,
        ),
        dispatcher=Dispatcher(LocalExchange(), num_experts=size.experts),
    )

    def run(x_TD: Tensor) -> Tensor:
        y_TD, aux = layer(x_TD, mode=RouterMode.TRAIN)
        return y_TD.sum() + 0.01 * aux.balance_loss

    return layer, run


def expert_loop(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Textbook code without capacity: every token keeps both experts."""
    router = nn.Linear(size.model_dim, size.experts, bias=False)
    experts = nn.ModuleList(dense_limit(size)[0] for _ in range(size.experts))

    def run(x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = router(x_TD).softmax(-1).topk(TOP_K)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(experts):
            token, choice = torch.where(ids_TK == index)
            y_TD.index_add_(0, token, expert(x_TD[token]) * weights_TK[token, choice, None])
        return y_TD.sum()

    return nn.ModuleList([router, experts]), run


WAYS = {"dense limit": dense_limit, "MoE layer": our_layer, "expert loop": expert_loop}


def measure(size: Size, *, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Milliseconds and peak MiB of each way at one size, and the ratios to the dense limit."""
    torch.manual_seed(0)
    steps: dict[str, Callable[[], None]] = {}
    for name, build in WAYS.items():
        module, run = build(size)
        module.to(device=device, dtype=dtype)
        x_TD = torch.randn(size.tokens, size.model_dim, device=device, dtype=dtype, requires_grad=True)
        steps[name] = _step(module, run, x_TD)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 2):
        for name, step in steps.items():
            elapsed_ms = _timed(step, device)
            if round_number >= 2:  # the first two warm up
                times[name].append(elapsed_ms)
    result: dict[str, Any] = asdict(size)
    limit_ms = statistics.median(times["dense limit"])
    for name, step in steps.items():
        milliseconds = statistics.median(times[name])
        result[name] = {
            "ms": round(milliseconds, 3),
            "ratio": round(milliseconds / limit_ms, 3),
            "peak_mib": round(_peak_bytes(step, device) / MIB, 1),
        }
    return result


def _step(module: nn.Module, run: Callable[[Tensor], Tensor], x_TD: Tensor) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        x_TD.grad = None
        run(x_TD).backward()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
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


def _peak_bytes(step: Callable[[], None], device: torch.device) -> int:
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


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": _clock(device).__name__,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
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


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| T | D | F | E | dense limit | MoE layer | expert loop | peak memory, MiB (same order) |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        shape = [str(result[key]) for key in ("tokens", "model_dim", "hidden_dim", "experts")]
        times = [f"{result[name]['ms']:.1f} ms ({result[name]['ratio']:.2f})" for name in WAYS]
        peaks = " / ".join(f"{result[name]['peak_mib']:.0f}" for name in WAYS)
        lines.append("| " + " | ".join([*shape, *times, peaks]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all sizes, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description="Time and memory of the MoE layer beside its dense limit.")
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--rounds", type=int, default=7, help="measured rounds per size (default: %(default)s)"
    )
    parser.add_argument("--sizes", type=int, help="measure the first N sizes only")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    report = environment(device, dtype)
    print(json.dumps(report), flush=True)
    report["results"] = []
    for size in SIZES[args.device][: args.sizes]:
        report["results"].append(measure(size, device=device, dtype=dtype, rounds=args.rounds))
    print("forward + backward; in brackets the ratio to the dense limit\n" + table(report["results"]))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
