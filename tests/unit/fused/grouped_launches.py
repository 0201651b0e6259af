"""Compile grouped products as they are launched, with their warps and stages and what Triton is told of the arguments.

Run as a program without ``TRITON_INTERPRET``; a GPU is not needed. It prints what would make them slow or fail.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.fused import grouped_product, launch
from fairseq_moe.fused.grouped_product import (
    RowTiles,
    grouped_grad_rows,
    grouped_grad_weight,
    grouped_outputs,
)

# Bytes that one program may share on sm_80 as on the smaller sm_86 and sm_89, and on sm_90.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
POINTERS = {torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
ROWS, HEIGHT, WIDTH, EXPERTS = 512, 1408, 2048, 8

DIRECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, RowTiles], Tensor]] = {
    "outputs": lambda x, grad, weight, tiles: grouped_outputs(x, weight, tiles),
    "grad_rows": lambda x, grad, weight, tiles: grouped_grad_rows(grad, weight, tiles),
    "grad_weight": lambda x, grad, weight, tiles: grouped_grad_weight(grad, x, tiles),
}
CASES = (
    *((direction, torch.float16, 90) for direction in DIRECTIONS),
    *((direction, torch.float16, 80) for direction in ("outputs", "grad_weight")),
    *((direction, torch.float32, 90) for direction in ("outputs", "grad_weight")),
)


class Recorder:
    """Stands where a kernel is, and compiles what it is called with."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability, self.compiled = kernel, capability, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        # As Triton's launcher: a number that is 1 becomes a constant, and multiples of 16 are told apart.
        types, attributes = dict.fromkeys(constants, "constexpr"), {}
        for index, (name, value) in enumerate(zip(self.kernel.arg_names, args, strict=False)):
            if isinstance(value, int) and value == 1:
                types[name], constants[name] = "constexpr", 1
                continue
            types[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=types, constexprs=constants, attrs=attributes)
        target, options = (
            GPUTarget("cuda", self.capability, 32),
            {"num_warps": num_warps, "num_stages": num_stages},
        )
        self.compiled.append(triton.compile(source, target=target, options=options))


def compile_case(direction: str, dtype: torch.dtype, capability: int) -> Any:
    """Compile what a direction launches for a GPU of that capability."""
    kernels = {name: getattr(grouped_product, name) for name in ("_multiply_rows", "_multiply_columns")}
    recorders = {name: Recorder(kernel, capability) for name, kernel in kernels.items()}
    ends_L = torch.zeros(EXPERTS, dtype=torch.int32)
    x, grad, weight = (
        torch.empty(shape, dtype=dtype) for shape in ((ROWS, WIDTH), (ROWS, HEIGHT), (EXPERTS, HEIGHT, WIDTH))
    )
    try:
        for name, recorder in recorders.items():
            setattr(grouped_product, name, recorder)
        tiles = RowTiles(ends_L, ends_L, grouped_product._BLOCKS[dtype.itemsize])
        DIRECTIONS[direction](x, grad, weight, tiles)
    finally:
        for name, kernel in kernels.items():
            setattr(grouped_product, name, kernel)
    (compiled,) = (compiled for recorder in recorders.values() for compiled in recorder.compiled)
    return compiled


def spilled_bytes(cubin: bytes) -> int:
    """Bytes of each thread that found no register."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def problems() -> Iterator[str]:
    launch.DEVICES.add("cpu")
    for direction, dtype, capability in CASES:
        compiled = compile_case(direction, dtype, capability)
        ptx, name = compiled.asm["ptx"], f"{direction} {dtype} sm_{capability}"
        if compiled.metadata.shared > SHARED_BYTES[capability]:
            yield f"{name}: {compiled.metadata.shared} bytes of shared memory"
        if spilled := spilled_bytes(compiled.asm["cubin"]):
            yield f"{name}: {spilled} bytes without a register"
        if "cp.async" not in ptx:
            yield f"{name}: loads are not started ahead"
        # float32 is multiplied exactly, which tensor cores do not.
        if (TENSOR_CORES[capability] in ptx) is not (dtype is torch.float16):
            yield f"{name}: tensor cores"


if __name__ == "__main__":
    found = list(problems())
    print("\n".join(found) or "all as expected")
    sys.exit(1 if found else 0)
