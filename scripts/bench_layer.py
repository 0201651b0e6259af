"""Time and memory of the MoE layer, forward and backward, beside its least cost and beside other layers.

    python scripts/bench_layer.py [goals | growth] [--json FILE]

Ways to spend the same floating-point operations on T tokens, K = 2 experts each, no token dropped:

- dense limit: T * K rows through one feed-forward network, that is, two plain matrix products, all rows at
  once or 512 at a time, whichever is faster in that round;
- MoE layer: ours, on one rank: routing, permutation, E experts, combination, auxiliary loss, statistics;
- peers: see ``bench_peers.py``; those that are not installed are named and left out.

The rounds of all ways are interleaved; a ratio is the median over the rounds of the ratio within a round, so
that other work on the machine disturbs all alike. Two kinds of memory are told: what is kept between forward and
backward pass, parameters and input not counted (a model keeps that of all its layers at once), and the peak during the
first forward and backward pass above what was there before it, which holds gradients, too.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from bench_machine import environment, peak_bytes, timed_ms
from bench_peers import PEERS, Run
from torch import Tensor, nn

from fairseq_moe.modules import (
    LOSSES,
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    TokenInfo,
    TopKConfig,
)
from fairseq_moe.modules.kernels import cpu_memory
from fairseq_moe.modules.routing.scores import ScoreRule

TOP_K = 2
CHUNK_ROWS = 512
MIB = 1024 * 1024
LIMIT, OURS = "dense limit", "MoE layer"
WHOLE, CHUNKED = "dense, whole", "dense, in chunks"


@dataclass(frozen=True)
class Size:
    """One measured shape.

    Args:
        tokens: T.
        model_dim: D.
        hidden_dim: F, of one expert.
        experts: E.
        dtype: of tokens and parameters.
        goal: largest ratio to the dense limit that we want; None: no goal.
    """

    tokens: int
    model_dim: int
    hidden_dim: int
    experts: int
    dtype: str = "float32"
    goal: float | None = None


SIZES = {
    ("goals", "cpu"): (
        Size(2048, 512, 2048, 8, "float32", 1.00),
        Size(2048, 512, 2048, 64, "float32"),
        Size(2048, 512, 2048, 8, "bfloat16", 1.25),
        Size(2048, 512, 2048, 64, "bfloat16", 2.2),
        Size(8192, 512, 2048, 8, "bfloat16", 0.90),
        Size(2048, 1024, 4096, 8, "bfloat16", 1.15),
    ),
    ("goals", "cuda"): (
        Size(8192, 1024, 4096, 8, "bfloat16"),
        Size(8192, 4096, 14336, 8, "bfloat16"),
        Size(16384, 2048, 8192, 64, "bfloat16"),
    ),
    ("growth", "cpu"): (
        *(Size(2048, 256, 1024, experts) for experts in (8, 16, 32, 64)),
        *(Size(tokens, 256, 1024, 8) for tokens in (4096, 8192, 16384)),
    ),
    ("growth", "cuda"): (
        *(Size(8192, 1024, 4096, experts, "bfloat16") for experts in (8, 16, 32, 64)),
        *(Size(tokens, 1024, 4096, 8, "bfloat16") for tokens in (16384, 32768, 65536)),
    ),
}


def dense_limit(size: Size, *, chunk_rows: int | None = None) -> tuple[nn.Module, Run]:
    """One network; each token passes K times. With ``chunk_rows`` each chunk has its own backward pass."""
    network = nn.Sequential(
        nn.Linear(size.model_dim, size.hidden_dim), nn.GELU(), nn.Linear(size.hidden_dim, size.model_dim)
    )

    def run(x_TD: Tensor) -> Tensor:
        rows = x_TD.repeat(TOP_K, 1)
        if chunk_rows is None:
            return network(rows).sum()
        chunks = rows.split(chunk_rows)
        for chunk in chunks[:-1]:
            network(chunk).sum().backward(retain_graph=True)
        return network(chunks[-1]).sum()

    return network, run


def our_layer(size: Size) -> tuple[nn.Module, Run]:
    """The layer as a decoder uses it, with an auxiliary loss."""
    layer = MoELayer(
        router=Router(
            model_dim=size.model_dim,
            num_experts=size.experts,
            config=TopKConfig(score=ScoreRule(top_k=TOP_K), aux_losses=frozenset({"aux"})),
        ),
        experts=Experts(
            num_local_experts=size.experts,
            first_expert_id=0,
            model_dim=size.model_dim,
            hidden_dim=size.hidden_dim,
            activation=F.gelu,
        ),
        dispatcher=LocalDispatcher(),
    )

    def run(x_TD: Tensor) -> Tensor:
        y_TD, aux = layer(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN))
        return y_TD.sum() + 0.01 * aux.losses[LOSSES.index("aux")]

    return layer, run


WAYS: dict[str, Callable[[Size], tuple[nn.Module, Run]]] = {
    WHOLE: dense_limit,
    CHUNKED: lambda size: dense_limit(size, chunk_rows=CHUNK_ROWS),
    OURS: our_layer,
    **PEERS,
}


def measure(
    size: Size, *, device: torch.device, rounds: int, warmups: int = 1, ways: Iterable[str] = tuple(WAYS)
) -> dict[str, Any]:
    """Median milliseconds, median ratio to the dense limit and peak MiB of each way at one size."""
    torch.manual_seed(0)
    dtype = getattr(torch, size.dtype)
    steps: dict[str, Callable[[], None]] = {}
    passes: dict[str, tuple[nn.Module, Run, Tensor]] = {}
    missing: dict[str, str] = {}
    for name in ways:
        try:
            module, run = WAYS[name](size)
        except (ImportError, OSError) as error:  # OSError: a library of theirs does not fit this torch
            missing[name] = str(error)
            continue
        module.to(device=device, dtype=dtype)
        x_TD = torch.randn(size.tokens, size.model_dim, device=device, dtype=dtype, requires_grad=True)
        steps[name] = _step(module, run, x_TD)
        passes[name] = module, run, x_TD
    cpu_memory.release()  # and first, because memory that we use again would not show in the next pass
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + warmups):
        for name, step in steps.items():
            elapsed_ms = timed_ms(step, device)
            if round_number >= warmups:
                times[name].append(elapsed_ms)
    dense = [times[name] for name in (WHOLE, CHUNKED)]
    limits_ms = [min(both) for both in zip(*dense, strict=True)]
    result: dict[str, Any] = {
        "size": vars(size),
        "missing": missing,
        "kT(D+F)_mib": _rows_bytes(size) / MIB,
        "branch_masks_mib": _mask_bytes(size) / MIB,
        LIMIT: {"ms": round(statistics.median(limits_ms), 3), "ratio": 1.0},
    }
    for name in steps:
        ratios = [way / limit for way, limit in zip(times[name], limits_ms, strict=True)]
        result[name] = {
            "ms": round(statistics.median(times[name]), 3),
            "ratio": round(statistics.median(ratios), 3),
            "peak_mib": round(peaks[name] / MIB, 1),
        }
        if name != CHUNKED:  # which has several backward passes
            result[name]["kept_mib"] = round(_kept_bytes(*passes[name]) / MIB, 1)
    return result


def _step(module: nn.Module, run: Run, x_TD: Tensor) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        x_TD.grad = None
        run(x_TD).backward()

    return step


def _kept_bytes(module: nn.Module, run: Run, x_TD: Tensor) -> int:
    """What autograd keeps after a forward pass, besides parameters and input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x_TD, *module.parameters())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run(x_TD)  # alive, or what it keeps would be freed and its addresses used again
    total = sum(kept.values())
    del loss
    return total


def _rows_bytes(size: Size) -> int:
    """One row of width D and one of width F for each of the T * K assignments."""
    itemsize = getattr(torch, size.dtype).itemsize
    return TOP_K * size.tokens * (size.model_dim + size.hidden_dim) * itemsize


def _mask_bytes(size: Size) -> int:
    """What the moe branch makes of T tokens: T x E x C combine weights (float32) and a mask (bool)."""
    capacity = TOP_K * -(-size.tokens // size.experts)
    return size.tokens * size.experts * capacity * (4 + 1)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table; after each time the memory kept, and at the peak, in MiB."""
    names = [name for name in WAYS if any(name in result for result in results)]
    head = ["T, D, F, E, dtype", "goal", LIMIT, *names, "kT(D+F), MiB", "branch's masks, MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        *shape, goal = result["size"].values()
        cells = [
            ", ".join(map(str, shape)),
            "" if goal is None else f"{goal:.2f}",
            f"{result[LIMIT]['ms']:.0f} ms",
        ]
        for name in names:
            way = result.get(name)
            cells.append("-" if way is None else _cell(way))
        cells += [f"{result['kT(D+F)_mib']:.0f}", f"{result['branch_masks_mib']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(way: dict[str, float]) -> str:
    kept = f"{way['kept_mib']:.0f}, " if "kept_mib" in way else ""
    return f"{way['ratio']:.2f} ({kept}{way['peak_mib']:.0f})"


def main() -> None:
    """Measure all sizes, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("goals", "growth"), default="goals")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: %(default)s)")
    parser.add_argument("--warmups", type=int, default=1, help="rounds before them (default: %(default)s)")
    parser.add_argument("--dtype", help="only sizes of this dtype")
    parser.add_argument("--sizes", type=int, help="the first N sizes only")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    report = environment(device)
    print(json.dumps(report), flush=True)
    report["results"] = []
    ways = [WHOLE, CHUNKED, *(way for way in args.ways if not way.startswith("dense"))]
    sizes = [size for size in SIZES[args.what, args.device] if args.dtype in (None, size.dtype)]
    for size in sizes[: args.sizes]:
        result = measure(size, device=device, rounds=args.rounds, warmups=args.warmups, ways=ways)
        print(json.dumps(result), flush=True)
        report["results"].append(result)
    print(
        "forward + backward: ratio to the dense limit (MiB kept between them, MiB at the peak)\n"
        + table(report["results"])
    )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
