"""Speed and memory of the converter: a Mixtral-shaped model of about 1.5 GB there and back, from FP8, and copied.

    python scripts/bench_convert.py [--layers 8] [--dir DIR]

Prints one JSON object; ``*_of_copy`` are speeds over that of a plain copy of the same files with a flush, in the same
run, both counted in bytes read. Memory is the peak of the converting process above what it held before (Linux only).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fairseq_moe.convert.hf.config_writer import write_config
from fairseq_moe.convert.hf.directory import INDEX
from fairseq_moe.convert.hf.file import SafetensorsWriter
from fairseq_moe.convert.hf.names import tensor_table
from fairseq_moe.convert.spec import ModelSpec, Rope, Routing

_SHARDS = 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dir", type=Path, help="where to put the files (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        print(json.dumps(_measure(Path(folder), args.layers), indent=1))


def _measure(folder: Path, layers: int) -> dict[str, Any]:
    num_bytes = _write_model(folder / "hf", layers, torch.bfloat16)
    copy_sec = _copy(folder / "hf", folder / "copy")
    there_sec, there_gb = _run(
        f"from_hf(Path({str(folder / 'hf')!r}), Path({str(folder / 'ours')!r}), expert_parallel_size=8)"
    )
    back_sec, back_gb = _run(f"to_hf(Path({str(folder / 'ours')!r}), Path({str(folder / 'back')!r}))")
    same = all(
        (folder / "back" / path.name).read_bytes() == path.read_bytes()
        for path in (folder / "hf").glob("*.safetensors")
    )
    fp8_bytes = _write_model(folder / "fp8", layers, torch.float8_e4m3fn)
    fp8_copy_sec = _copy(folder / "fp8", folder / "fp8-copy")
    fp8_sec, fp8_gb = _run(f"from_hf(Path({str(folder / 'fp8')!r}), Path({str(folder / 'from-fp8')!r}))")
    shard_bytes = max(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    return {
        "model_gb": num_bytes / 1e9,
        "largest_shard_gb": shard_bytes / 1e9,
        "copy_gb_per_s": num_bytes / 1e9 / copy_sec,
        "from_hf_gb_per_s": num_bytes / 1e9 / there_sec,
        "to_hf_gb_per_s": num_bytes / 1e9 / back_sec,
        "fp8_copy_gb_per_s": fp8_bytes / 1e9 / fp8_copy_sec,
        "from_fp8_gb_per_s": fp8_bytes / 1e9 / fp8_sec,
        "from_hf_of_copy": copy_sec / there_sec,
        "to_hf_of_copy": copy_sec / back_sec,
        "from_fp8_of_copy": fp8_copy_sec / fp8_sec,
        "from_hf_peak_gb": there_gb,
        "from_fp8_peak_gb": fp8_gb,
        "to_hf_peak_gb": back_gb,
        "same_files": same,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }


def _copy(source: Path, target: Path) -> float:
    """Copy through this process's memory, as the converter does (the kernel alone would be faster); returns seconds."""
    start = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            while chunk := reader.read(1 << 24):
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
    return time.perf_counter() - start


def _write_model(directory: Path, layers: int, dtype: torch.dtype) -> int:
    spec = ModelSpec(
        family="mixtral", vocab_size=8192, model_dim=1024, num_layers=layers, num_heads=16, num_kv_heads=4, head_dim=64,
        rope=Rope(theta=1e6), norm_eps=1e-5, expert_ffn_dim=3584, moe_layers=(True,) * layers,
        routing=Routing(num_experts=8, top_k=2, normalized=True), max_positions=4096,
    )  # fmt: skip
    directory.mkdir()
    config = write_config(spec, dtype="bfloat16")
    shapes = {
        b.name: (torch.bfloat16, b.shape) for tensor in tensor_table(spec, fused=False) for b in tensor.blocks
    }
    if dtype is torch.float8_e4m3fn:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        }
        for name, (_, shape) in list(shapes.items()):
            if ".experts." in name:
                shapes[name] = (dtype, shape)
                shapes[name + "_scale_inv"] = (torch.float32, tuple(-(-size // 128) for size in shape))
    (directory / "config.json").write_text(json.dumps(config))
    names, weight_map, num_bytes = list(shapes), {}, 0
    for index in range(_SHARDS):
        file = f"model-{index + 1:05d}-of-{_SHARDS:05d}.safetensors"
        own = names[index * len(names) // _SHARDS : (index + 1) * len(names) // _SHARDS]
        writer = SafetensorsWriter(directory / file, {name: shapes[name] for name in own})
        writer.write(torch.randn(shapes[name][1]).to(shapes[name][0]) for name in writer.names)
        weight_map |= dict.fromkeys(own, file)
        num_bytes += writer.num_bytes
    index_text = json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    (directory / INDEX).write_text(index_text)
    return num_bytes


_CODE = """
import re, time
from pathlib import Path
from fairseq_moe.convert import from_hf, to_hf
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before, start = kilobytes("VmRSS"), time.perf_counter()
{statement}
print("found", time.perf_counter() - start, kilobytes("VmHWM") - before)
"""


def _run(statement: str) -> tuple[float, float]:
    """Seconds of the statement in a process of its own, and its peak of resident memory above the start, in GB."""
    code = _CODE.replace("{statement}", statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _, seconds, kilobytes = done.stdout.strip().splitlines()[-1].split()
    return float(seconds), int(kilobytes) * 1024 / 1e9


if __name__ == "__main__":
    main()
