"""Whole training runs for bench_gpu.py: words per second of fairseq-train, and where the time of an update goes.

As a program it is fairseq-train with a profiler around three updates, whose findings it prints as the last line.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_gpu_timer import Bench, device_events

__all__ = ["RUNS", "arguments_of", "training_rows"]

ROOT = Path(__file__).resolve().parents[1]
_COMMON = """--task dummy_lm --arch transformer_lm_gpt --share-decoder-input-output-embed --disable-validation
  --no-save --log-format json --log-interval 1 --lr 0.0005 --optimizer adam --adam-betas '(0.9, 0.98)' --num-workers 0
  --distributed-world-size 1"""
_SIX = """--decoder-layers 6 --decoder-embed-dim 2048 --decoder-ffn-embed-dim 8192 --decoder-attention-heads 32
  --tokens-per-sample 2048 --batch-size 4 --bf16 --dropout 0 --attention-dropout 0 --clip-norm 1.0"""
_MOE = """--moe-gating-use-fp32 --moe-second-expert-policy all --criterion moe_cross_entropy --moe-gate-loss-wt 0.01"""
_MIXTRAL = """--arch mixtral_8x7b --decoder-layers 2 --tokens-per-sample 4096 --batch-size 2
  --memory-efficient-bf16 --clip-norm 1.0 --criterion moe_cross_entropy"""
# scripts/train_single_node.sh, the command of the README of fairseq's moe branch.
_BRANCH = f"""--ddp-backend fully_sharded --memory-efficient-fp16 --checkpoint-activations --tokens-per-sample 2048
  --decoder-embed-dim 2048 --decoder-ffn-embed-dim 8192 --decoder-attention-heads 32 --moe-expert-count 8
  --moe-freq 2 {_MOE} --moe-normalize-expert-grad sqrt_world_size --moe-gate-loss-combine-method sum
  --fp16-adam-stats --clip-norm 0.0 --dropout 0.1 --attention-dropout 0.1 --batch-size 4"""
# Name, flags, goal in words per second (one H200), updates, and the numbers that a token is multiplied with, in
# millions: matrices of attention, networks, experts of a token, and 50,000 words.
RUNS = (
    ("dense, 6 x 2048, bf16", f"{_SIX} --criterion cross_entropy", None, 12, 404),
    (
        "8 experts in every 2nd of 6 layers, bf16",
        f"{_SIX} {_MOE} --moe-freq 2 --moe-expert-count 8",
        None,
        12,
        505,
    ),
    ("mixtral_8x7b, 2 layers, 2 x 4096", _MIXTRAL, 58_000, 12, 993),
    ("the same, --update-freq 16", f"{_MIXTRAL} --update-freq 16", 73_500, 5, 993),
    ("README's command, 24 layers, 8 experts", f"{_BRANCH} --decoder-layers 24", 20_000, 10, 1713),
    ("the same, 6 layers", f"{_BRANCH} --decoder-layers 6", None, 10, 505),
)
# The same flags on a CPU, to see that they are taken: the last one of a name counts.
_SMALL = shlex.split("""--cpu --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32
  --decoder-attention-heads 2 --tokens-per-sample 16 --batch-size 2 --update-freq 2 --dict-size 40""")
_SMALL_PRESET = ["--decoder-kv-heads", "2", "--moe-ffn-hidden-size", "32"]
_PROFILED = range(6, 8)  # updates


def training_rows(bench: Bench) -> list[dict[str, Any]]:
    """Train once per run, each in a process of its own."""
    if importlib.util.find_spec("fairseq") is None:
        return [{"run": "none: fairseq is not installed"}]
    found = []
    for name, flags, goal, updates, millions in RUNS[1:2] if bench.is_small else RUNS:
        if not bench.has_time(name):
            continue
        arguments = [*arguments_of(flags, is_small=bench.is_small), "--max-update", str(updates)]
        # The last run may go a little over the part's time: half of its time is spent on its start.
        row: dict[str, Any] = {"run": name, "goal": goal or ""}
        row |= _run(arguments, seconds=bench.seconds_left + 30)
        if isinstance(
            row["words/s"], float
        ):  # products of attention and what is computed again are not counted
            row["useful TFLOPS"] = 6e-6 * millions * row["words/s"]
        found.append(row)
    return found


def arguments_of(flags: str, *, is_small: bool) -> list[str]:
    """The arguments of fairseq-train for the flags of a run."""
    # A dense model stays stock's beside the plugin, without which stock takes bfloat16 for a TPU's.
    given = [*shlex.split(f"{_COMMON} {flags}"), "--user-dir", str(ROOT / "fairseq_moe")]
    return [*given, *_SMALL, *(_SMALL_PRESET if "mixtral" in flags else [])] if is_small else given


def _run(arguments: list[str], *, seconds: float) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *arguments],
            env={"OMP_NUM_THREADS": "4", **os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"words/s": "out of time"}
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode != 0 or not last[0].startswith("{"):
        return {"words/s": f"failed: {(done.stderr or done.stdout).strip()[-200:]}"}
    return dict(json.loads(last[0]))


def _groups(profile: Any) -> dict[str, Any]:
    """Milliseconds of the device by kind of kernel, launches and waits, for one update."""
    kinds = {
        "products": ("gemm", "cutlass", "nvjet", "grouped", "_multiply"),
        "attention": ("attention", "flash", "fmha"),
        "optimizer": ("adam",),
        "norms of gradients, foreach": ("lpnorm", "multi_tensor_apply"),
        "fused kernels": (
            "_add_rows", "_activate", "_spread_rows", "_add_bias", "_nll", "choose_experts", "pass_back_to_logits",
            "_count_bins", "_place_assignments", "_quantize", "_sum_experts", "_move_factors", "_write_plan",
        ),
        "copies and casts": ("copy", "memcpy", "memset"),
    }  # fmt: skip
    spent: dict[str, float] = {}
    launches = waits = 0
    for event in device_events(profile):
        launches += event.count
        name = event.key.lower()
        kind = next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "other")
        spent[kind] = spent.get(kind, 0.0) + event.self_device_time_total / 1000
    # cudaDeviceSynchronize is this program's own.
    for event in profile.key_averages():
        if event.key.lower() in ("cudastreamsynchronize", "cudaeventsynchronize"):
            waits += event.count
    number = len(_PROFILED)
    found: dict[str, Any] = {f"{kind}, ms": total / number for kind, total in sorted(spent.items())}
    return {**found, "launches": launches // number, "host waits": waits // number}


def main() -> int:
    """Run fairseq-train, time its updates, and profile some of them."""
    from fairseq.trainer import Trainer
    from fairseq_cli.train import cli_main

    stock_step = Trainer.train_step
    state: dict[str, Any] = {"updates": 0, "rates": [], "profile": None}

    def train_step(self: Any, samples: list[Any], raise_oom: bool = False) -> Any:
        state["updates"] += 1
        is_profiled = torch.cuda.is_available() and state["updates"] in _PROFILED
        if is_profiled and state["profile"] is None:
            state["profile"] = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            )
            state["profile"].__enter__()
        _synchronize()
        start = time.perf_counter()
        output = stock_step(self, samples, raise_oom)
        _synchronize()
        seconds = time.perf_counter() - start
        if state["updates"] == _PROFILED.stop - 1 and state["profile"] is not None:
            state["profile"].__exit__(None, None, None)
        if state["updates"] > 3 and not is_profiled:
            state["rates"].append(sum(int(sample["ntokens"]) for sample in samples) / seconds)
        return output

    Trainer.train_step = train_step
    cli_main()
    rates = sorted(state["rates"])
    found: dict[str, Any] = {"words/s": rates[len(rates) // 2] if rates else "no update"}
    if torch.cuda.is_available():
        found["peak, GB"] = torch.cuda.max_memory_allocated() / 2**30
    if state["profile"] is not None:
        found |= _groups(state["profile"])
    print(json.dumps(found), flush=True)
    return 0


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
