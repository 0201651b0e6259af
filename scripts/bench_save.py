"""What a save costs: how long training waits, and bytes per second against a plain write of the same bytes.

    python scripts/bench_save.py [--mib 256] [--dir DIR] [--json FILE]

One rank's share of a model with Adam's moments is saved as the trainer saves it: written, with its digest, and
flushed to disk; then the main file. With --save-in-background training waits for the copy in memory alone; it is
taken into the memory of the copy before, so the first save of a run takes longer.
The plain write is one sequential write and flush of as many bytes. Rounds alternate between the three.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_machine import environment

from fairseq_moe.checkpoint import ModelShape, SetId, ShardContent, commit_main, write_shard

EXPERTS, MODEL_DIM = 8, 512


def content_of(mib: int) -> ShardContent:
    """A third each of weights and of Adam's two moments."""
    rows = mib * 1024 * 1024 // (3 * 4 * EXPERTS * MODEL_DIM)
    name = "decoder.layers.1.moe_layer.experts.fc1_weight"
    shape = (EXPERTS, rows, MODEL_DIM)
    return ShardContent(
        expert_ids=list(range(EXPERTS)),
        model={name: torch.randn(shape)},
        optimizer={name: {"exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape), "step": 1}},
    )


def save(content: ShardContent, folder: Path) -> None:
    """All of a save that training waits for without --save-in-background."""
    set_id = SetId.new(run_id="bench", update=1)
    entry = write_shard(folder, set_id, index=0, num_shards=1, content=content)
    shape = ModelShape(num_experts=EXPERTS, top_k=2, model_dim=MODEL_DIM, expert_dim=2048, num_layers=2)
    commit_main(folder / "checkpoint_last.pt", state={}, set_id=set_id, shape=shape, entries=[entry])


def plain_write(data: memoryview, folder: Path) -> None:
    """One sequential write."""
    with (folder / "plain").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def measure(mib: int, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round."""
    content = content_of(mib)
    copy = content.copied()  # of the save before
    data = memoryview(torch.randint(256, (mib * 1024 * 1024,), dtype=torch.uint8).numpy())
    ways: dict[str, Callable[[Path], Any]] = {
        "plain write": lambda place: plain_write(data, place),
        "save": lambda place: save(content, place),
        "save in background: training waits": lambda place: content.copied(copy),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                start_sec = time.perf_counter()
                way(Path(place))
                seconds[name].append(time.perf_counter() - start_sec)
    return seconds


def main() -> None:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the share (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="on the disk to measure (default: the temporary directory)")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    report = environment(torch.device("cpu"))
    report["seconds"] = measure(args.mib, args.dir or Path(tempfile.gettempdir()), args.rounds)
    save_seconds = report["seconds"]["save"]
    print("| | seconds | MiB/s | share of a save |\n|---|--:|--:|--:|")
    for name, found in report["seconds"].items():
        share = statistics.median(one / of for one, of in zip(found, save_seconds, strict=True))
        middle = statistics.median(found)
        print(f"| {name} | {middle:.2f} | {args.mib / middle:.0f} | {100 * share:.0f} % |")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
