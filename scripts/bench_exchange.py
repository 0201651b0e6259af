"""The exchange of tokens between ranks: bytes, and its share of a layer's forward and backward time.

    python scripts/bench_exchange.py [--ranks 2 4] [--json FILE]

Every rank is a process on this machine with one thread, over gloo; ``--model-dim`` and the like set the
layer. Time in the exchange includes waiting for the slowest rank, so with more ranks than cores it says
little. Bytes are those that leave a rank for another one, forward and backward, and are compared with the
least possible: the rows whose expert lives elsewhere, there and back, in both passes, and the counts.
"""

import argparse
import json
import os
import socket
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_machine import environment
from torch import multiprocessing as mp

from fairseq_moe.distributed import GroupExchange
from fairseq_moe.modules import (
    AllToAllDispatcher,
    Experts,
    MoELayer,
    Router,
    RouterMode,
    TokenInfo,
    TopKConfig,
)
from fairseq_moe.modules.routing.scores import ScoreRule

TOP_K = 2
EXCHANGES_OF_ROWS = 4  # to the experts and back, in each of the two passes


@dataclass
class Meter:
    """Stands in for ``all_to_all_single`` and adds up its time and what it sends to others."""

    rank: int
    seconds: float = 0.0
    bytes_sent: int = 0
    original: Any = field(default_factory=lambda: dist.all_to_all_single)

    def __call__(self, output: Any, rows: Any, recv: Any = None, send: Any = None, **options: Any) -> Any:
        """As torch's function."""
        group = options["group"]
        splits = send or [len(rows) // dist.get_world_size(group)] * dist.get_world_size(group)
        row_bytes = rows[:1].numel() * rows.element_size() if len(rows) else 0
        self.bytes_sent += (sum(splits) - splits[self.rank]) * row_bytes
        work = self._timed(self.original, output, rows, recv, send, **options)
        return SimpleNamespace(wait=lambda: self._timed(work.wait))

    def _timed(self, call: Any, *args: Any, **options: Any) -> Any:
        start_sec = time.perf_counter()
        result = call(*args, **options)
        self.seconds += time.perf_counter() - start_sec
        return result


def worker(rank: int, ranks: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """One rank: measures ``args.steps`` steps."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    share = args.experts // ranks
    layer = MoELayer(
        router=Router(
            model_dim=args.model_dim,
            num_experts=args.experts,
            config=TopKConfig(score=ScoreRule(top_k=TOP_K)),
        ),
        experts=Experts(
            num_local_experts=share,
            first_expert_id=rank * share,
            model_dim=args.model_dim,
            hidden_dim=args.hidden_dim,
            activation=F.gelu,
        ),
        dispatcher=AllToAllDispatcher(GroupExchange(dist.new_group())),
    )
    x_TD = torch.randn(args.tokens, args.model_dim, requires_grad=True)
    meter = Meter(rank)
    dist.all_to_all_single = meter  # type: ignore[assignment]
    shares, milliseconds = [], []
    for _ in range(args.steps + 1):
        layer.zero_grad(set_to_none=True)
        dist.barrier()
        meter.seconds, meter.bytes_sent = 0.0, 0
        start_sec = time.perf_counter()
        layer(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN))[0].sum().backward()
        elapsed_sec = time.perf_counter() - start_sec
        shares.append(meter.seconds / elapsed_sec)
        milliseconds.append(1000 * elapsed_sec)
    with torch.no_grad():
        ids_TK = layer.router(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN)).decision.expert_ids_TK
    remote_rows = int((ids_TK // share != rank).sum())
    count_bytes = (ranks - 1) * share * 8
    results[rank] = {
        "ms": statistics.median(milliseconds[1:]),
        "share": statistics.median(shares[1:]),
        "bytes": meter.bytes_sent,
        "least_bytes": EXCHANGES_OF_ROWS * remote_rows * args.model_dim * 4 + count_bytes,
    }
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over steps, means over ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(ranks, port, args, results), nprocs=ranks)  # type: ignore[attr-defined]
        of_ranks = [results[rank] for rank in range(ranks)]
    mean = {key: statistics.mean(each[key] for each in of_ranks) for key in of_ranks[0]}
    return {
        "ranks": ranks,
        **mean,
        # A rank also sends back what it received, so only the sum over the ranks follows from the routing.
        "is_least": sum(each["bytes"] for each in of_ranks) == sum(each["least_bytes"] for each in of_ranks),
    }


def main() -> None:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--hidden-dim", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    report = environment(torch.device("cpu"))
    report["layer"] = {key: vars(args)[key] for key in ("tokens", "model_dim", "hidden_dim", "experts")}
    report["results"] = [measure(ranks, args) for ranks in args.ranks]
    print("| ranks | step | in the exchange | sent by a rank | the least possible |\n|--:|--:|--:|--:|--:|")
    for row in report["results"]:
        sent, least = (f"{row[key] / 1e6:.1f} MB" for key in ("bytes", "least_bytes"))
        print(f"| {row['ranks']} | {row['ms']:.0f} ms | {100 * row['share']:.1f} % | {sent} | {least} |")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
