"""Training speed beside stock dense fairseq: words per second of fairseq-train, as a ratio.

    python scripts/bench_train.py [--json FILE]

A language model of 4 layers, 512 wide, on 4 x 512 tokens of dummy data: dense by fairseq-train without this
plugin, and with 8 and with 32 experts in every second layer, two per token. A layer with experts has the
dense layer's width in each expert, so its tokens cost it twice the work. Commands run one after the other,
over and over, on one thread each; a run's speed is the median over its updates but the first ones, and a
ratio is the median over the repetitions of the ratio to the dense run beside it. fairseq's words per second
go by wall time: other work on the machine disturbs them.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_machine import environment

ROOT = Path(__file__).resolve().parents[1]
DENSE = "dense (stock)"
WARMUP_UPDATES = 2

COMMON = shlex.split("""
  --cpu --distributed-world-size 1 --task dummy_lm --dataset-size 1000 --disable-validation --no-save
  --arch transformer_lm_gpt --share-decoder-input-output-embed --decoder-layers 4 --decoder-embed-dim 512
  --decoder-ffn-embed-dim 2048 --decoder-attention-heads 8 --dropout 0.0 --attention-dropout 0.0
  --optimizer adam --lr 0.0005 --clip-norm 0.0 --tokens-per-sample 512 --batch-size 4 --update-freq 1
  --log-format json --log-interval 1 --num-workers 0
""")
EXPERTS = shlex.split("""
  --moe-freq 2 --moe-gating-use-fp32 --moe-second-expert-policy all --criterion moe_cross_entropy
  --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum --fused-attention
""")


def commands(dict_size: int, updates: int) -> dict[str, list[str]]:
    """What is compared."""
    common = [*COMMON, "--dict-size", str(dict_size), "--max-update", str(updates)]
    experts = [*common, *EXPERTS, "--user-dir", str(ROOT / "fairseq_moe"), "--moe-expert-count"]
    return {
        DENSE: [*common, "--criterion", "cross_entropy"],
        "8 experts": [*experts, "8"],
        "32 experts": [*experts, "32"],
    }


def words_per_second(arguments: list[str]) -> float:
    """Train once."""
    run = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode != 0:
        raise SystemExit(f"fairseq-train {' '.join(arguments)} failed:\n{run.stdout[-3000:]}")
    return speed_of(run.stdout)


def speed_of(log: str) -> float:
    """Median words per second over the updates of a json log, without the first ones."""
    updates = [
        json.loads(line.partition("| train_inner | ")[2])
        for line in log.splitlines()
        if "| train_inner | " in line
    ]
    return statistics.median(float(update["wps"]) for update in updates[WARMUP_UPDATES:])


def summary(speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median speed and median ratio to the dense run of the same repetition."""
    return [
        {
            "run": name,
            "wps": round(statistics.median(found)),
            "ratio": round(statistics.median(a / b for a, b in zip(found, speeds[DENSE], strict=True)), 3),
        }
        for name, found in speeds.items()
    ]


def main() -> None:
    """Train, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3, help="of each command (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=12, help="of each run (default: %(default)s)")
    parser.add_argument("--dict-size", type=int, default=1000, help="vocabulary (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    report = environment(torch.device("cpu"))
    runs = commands(args.dict_size, args.updates)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repetitions):
        for name, arguments in runs.items():
            speeds[name].append(words_per_second(arguments))
            print(f"{name}: {speeds[name][-1]:.0f} words/s", flush=True)
    report["speeds"] = speeds
    report["results"] = summary(speeds)
    print("| run | words/s | ratio |\n|---|--:|--:|")
    for row in report["results"]:
        print(f"| {row['run']} | {row['wps']} | {row['ratio']:.2f} |")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
