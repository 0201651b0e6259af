"""What the step guard adds to an update: its time as a share of a training step of the demo's model.

    python scripts/bench_guard.py [--ranks 2] [--json FILE]

Every rank is a process on this machine with one thread, over gloo, with the demo's model and batch on dummy
data. The guard rides on the all-reduce of the gradient norm, so its cost is the time inside its own methods,
and what the longer row adds to that all-reduce; each is timed by itself, because the difference between two
whole runs is smaller than what other work on the machine makes of it. The heartbeat runs in a thread of its
own; its share is the time of one beat by the time between two.
"""

import argparse
import functools
import json
import os
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from bench_machine import environment
from torch import multiprocessing as mp

VOCABULARY = 4000
FLAGS = shlex.split(f"""
  --user-dir {Path(__file__).resolve().parents[1] / "fairseq_moe"} --cpu --distributed-backend gloo
  --task dummy_lm --dict-size {VOCABULARY} --tokens-per-sample 128 --batch-size 8
  --arch transformer_lm_gpt --share-decoder-input-output-embed --decoder-layers 4 --decoder-embed-dim 128
  --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --dropout 0.0 --attention-dropout 0.0
  --optimizer adam --lr 0.004 --clip-norm 1.0 --ddp-backend legacy_ddp --no-save
  --moe-freq 2 --moe-expert-count 8 --moe-gating-use-fp32 --moe-second-expert-policy all
  --criterion moe_cross_entropy --moe-gate-loss-wt 0.01
""")
GUARD_METHODS = ("begin_update", "see_loss", "see_before_sum", "values", "judge", "skip_if_bad")


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """``function``, which then adds its seconds to the last entry of ``spent``."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start_sec = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[-1] += time.perf_counter() - start_sec

    return wrapped


def build_trainer(ranks: int) -> Any:
    """fairseq's Trainer of the demo's model, as fairseq-train builds it."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.trainer import Trainer

    sys.argv = ["bench_guard", *FLAGS, "--distributed-world-size", str(ranks)]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser()))
    cfg.distributed_training.distributed_rank = dist.get_rank()
    task = tasks.setup_task(cfg.task)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def batch(seed: int) -> dict[str, Any]:
    """8 x 128 random words, in the form of fairseq's collater."""
    words = torch.randint(4, VOCABULARY, (8, 129), generator=torch.Generator().manual_seed(seed))
    lengths = torch.full((8,), 128)
    return {
        "id": torch.arange(8),
        "nsentences": 8,
        "ntokens": 8 * 128,
        "net_input": {"src_tokens": words[:, :-1].contiguous(), "src_lengths": lengths},
        "target": words[:, 1:].contiguous(),
    }


def all_reduce_sec(length: int, rounds: int) -> float:
    """Median seconds of an all-reduce of so many float64 numbers."""
    found = []
    for _ in range(rounds):
        start_sec = time.perf_counter()
        dist.all_reduce(torch.zeros(length, dtype=torch.float64))
        found.append(time.perf_counter() - start_sec)
    return statistics.median(found)


def measure(rank: int, steps: int) -> dict[str, float]:
    """Milliseconds of a step, of the guard's parts in it, and of a heartbeat; medians."""
    from fairseq_moe.distributed import watchdog
    from fairseq_moe.stock.step.guard import StepGuard

    trainer = build_trainer(dist.get_world_size())
    guard_sec: list[float] = []
    for name in GUARD_METHODS:
        setattr(StepGuard, name, timed(getattr(StepGuard, name), guard_sec))
    step_sec = []
    for step in range(steps):
        guard_sec.append(0.0)
        start_sec = time.perf_counter()
        trainer.train_step([batch(step * dist.get_world_size() + rank)])
        step_sec.append(time.perf_counter() - start_sec)
    lengths = (4, 4 + StepGuard.NUM_VALUES)
    pairs = [[all_reduce_sec(length, 50) for length in lengths] for _ in range(9)]
    beating = watchdog.Watchdog.of_this_process()
    assert beating is not None
    beating.stop()
    start_sec = time.perf_counter()
    for _ in range(100):
        beating._beat()
        beating._read_verdict()
    beat_sec = (time.perf_counter() - start_sec) / 100
    dist.barrier()
    return {
        "step_ms": 1e3 * statistics.median(step_sec[2:]),
        "guard_ms": 1e3 * statistics.median(guard_sec[2:]),
        "longer_all_reduce_ms": 1e3 * statistics.median(longer - short for short, longer in pairs),
        "heartbeat_share": beat_sec / watchdog._BEAT_SEC,
    }


def worker(rank: int, ranks: int, port: int, steps: int, results: Any) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    found = measure(rank, steps)
    if rank == 0:
        results.put(found)


def main() -> None:
    """Measure, print and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="updates (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, args=(args.ranks, port, args.steps, results), nprocs=args.ranks)
    found = results.get()
    found["guard_share"] = (found["guard_ms"] + found["longer_all_reduce_ms"]) / found["step_ms"]
    print("| ranks | step | guard | longer all-reduce | share of the step | heartbeat thread |")
    print("|--:|--:|--:|--:|--:|--:|")
    print(
        f"| {args.ranks} | {found['step_ms']:.1f} ms | {found['guard_ms']:.3f} ms | "
        f"{found['longer_all_reduce_ms']:.3f} ms | {found['guard_share']:.2%} | {found['heartbeat_share']:.2%} |"
    )
    if args.json is not None:
        report = {**environment(torch.device("cpu")), "ranks": args.ranks, "results": found}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
