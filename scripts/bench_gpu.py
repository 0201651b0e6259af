"""Speed of the layer, its kernels, optimizers and whole training runs on one GPU, in at most six minutes.

    python scripts/bench_gpu.py [--only PART ...] [--quick] [--json FILE]

Prints a Markdown table for each part and, with --json, writes all figures. It needs torch 2.11 or later and this
checkout; fairseq and other packages' layers are measured where they are installed, and named where not. No network. A
part whose time is used up stops and says so. ``--device cpu --quick`` runs every part on tiny sizes, to see that it
works.
"""

import argparse
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]  # built for another torch it cannot be imported
if importlib.util.find_spec("fairseq") is None:
    # The package registers itself with fairseq when it is imported; its layers do not need that.
    bare = types.ModuleType("fairseq_moe")
    bare.__path__ = [str(ROOT / "fairseq_moe")]
    sys.modules["fairseq_moe"] = bare

import torch  # noqa: E402
from bench_gpu_parts import PARTS  # noqa: E402
from bench_gpu_timer import Bench  # noqa: E402

BUDGET_SEC = 310.0  # and thirty for a run that is under way


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    for package in ("triton", "transformers", "scattermoe", "liger_kernel", "sonicmoe", "fairseq"):
        spec = importlib.util.find_spec(package)
        found[package] = "installed" if spec is not None else "missing"
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table, whose columns are the keys of all rows in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--quick", action="store_true", help="few repetitions, and small sizes on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and not args.quick:
        parser.error("this measures a GPU, and there is none; --device cpu --quick only shows that it works")
    about = describe(device)
    print(" | ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    started, results = time.perf_counter(), {}
    share = sum(PARTS[name].share for name in args.only)
    for name in args.only:
        left = BUDGET_SEC - (time.perf_counter() - started)
        bench = Bench(device, quick=args.quick, seconds=left * PARTS[name].share / share)
        share -= PARTS[name].share
        rows = PARTS[name].measure(bench)
        results[name] = rows
        print(f"\n## {name}: {PARTS[name].title}\n\n{markdown(rows)}", flush=True)
        if bench.left_out:
            print(f"\nLeft out, out of time: {', '.join(bench.left_out)}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"about": about, "parts": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
