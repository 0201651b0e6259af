"""Every kernel with types and constants as a GPU is given them; run as a program, compile all for sm_90 without one.

A pointer is written ``*bf16``; numbers that the host passes are ``i32``, ``i64`` or ``fp32``; all else is a constant.
"""

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any

import fairseq_moe.fused

Call = tuple[dict[str, str], dict[str, Any]]

# Kernels that promise the numbers of stock, or of their twins, within one rounding: roots, quotients and narrower
# numbers are rounded as torch rounds them. (The interpreter cuts bfloat16 off.)
EXACT = {
    "adam._adam",
    "half_adam._half_adam",
    "quantize_rows._quantize_columns",
    "quantize_rows._quantize_rows",
}
_ROUGH = re.compile(r"\b(?:sqrt|rcp|div|cvt)\.(?:approx|full|rz)\b[.\w]*")

_ADAM_NUMBERS = ("step_size", "beta1", "share1", "beta2", "share2", "eps", "decay")

CALLS: dict[str, list[Call]] = {
    "adam._adam": [
        (
            {
                "values": dtype, "grads": grad, "exp_avg": "*fp32", "exp_avg_sq": "*fp32", "scale": "*fp32",
                "copies": grad, "numel": numel, **dict.fromkeys(_ADAM_NUMBERS, "fp32"),
            },
            {"HAS_SCALE": scaled, "HAS_COPY": copied, "BLOCK": 2048},
        )
        for dtype, grad, numel, scaled, copied in (
            ("*bf16", "*bf16", "i64", True, False), ("*fp32", "*fp16", "i32", True, True),
            ("*fp32", "*fp32", "i32", False, False),
        )
    ],
    "add_rows._add_rows": [
        (
            {"rows": dtype, "row_of": "*i64", "weights": dtype, "y": dtype, "width": "i32"},
            {"HAS_WEIGHTS": weighted, "K": top_k, "BLOCK_D": 1024},
        )
        for dtype, weighted, top_k in (("*bf16", True, 8), ("*fp16", False, 2), ("*fp32", True, 1))
    ],
    "add_rows._spread_rows": [
        (
            {
                "grad": dtype, "token_of": "*i64", "rows": dtype, "weights": dtype,
                "grad_rows": dtype, "grad_weights": dtype, "width": "i32",
            },
            {"BLOCKS": blocks, "BLOCK_D": 1024},
        )
        for dtype, blocks in (("*bf16", 2), ("*fp32", 4))
    ],
    "add_bias._add_bias": [
        (
            {
                "rows": dtype, "bias": dtype, "expert_of": "*i64", "weights": dtype,
                "num_rows": "*i64", "width": "i32",
            },
            {"HAS_WEIGHTS": weighted, "IS_COUNTED": counted, "BLOCK_D": 1024},
        )
        for dtype, weighted, counted in (("*bf16", True, True), ("*fp16", False, False))
    ],
    "grouped_product._multiply_rows": [
        (
            {
                "x": dtype, "weight": dtype, "y": dtype, "ends": "*i32", "tile_ends": "*i32", "width": "i32",
                "stride_expert": "i32", "stride_depth": "i32", "stride_width": "i32", "num_tiles": "i32",
            },
            {
                "NUM_EXPERTS": 8, "EXPERTS_BLOCK": 8, "DEPTH": 2048, "PRECISION": "ieee", "WIDEN": False, "ROWS": block,
                "COLUMNS": block, "BLOCK": deep, "GROUP": 8,
            },
        )
        for dtype, block, deep in (("*fp16", 128, 64), ("*bf16", 128, 64), ("*fp32", 64, 32))
    ],
    "grouped_product._multiply_columns": [
        (
            {
                "grad": dtype, "x": dtype, "grad_weight": dtype, "ends": "*i32", "height": "i32", "width": "i32",
            },
            {"PRECISION": "ieee", "WIDEN": False, "ROWS": block, "COLUMNS": block, "BLOCK": deep, "GROUP": 8},
        )
        for dtype, block, deep in (("*fp16", 128, 64), ("*bf16", 128, 64), ("*fp32", 64, 32))
    ],
    "half_adam._half_adam": [
        (
            {
                "values": dtype, "grads": grad, "exp_avg": "*fp16", "root": "*fp16", "factor": "*fp32",
                "largest": "*fp32", "numel": numel, "seed": "i64", **dict.fromkeys(_ADAM_NUMBERS, "fp32"),
                **{f"{age}_{name}_scale": "*fp32" for age in ("old", "new") for name in ("avg", "root")},
            },
            {"HAS_FACTOR": scaled, "TILE": 1024},
        )
        for dtype, grad, numel, scaled in (("*bf16", "*bf16", "i64", True), ("*fp32", "*fp32", "i32", False))
    ],
    "nll._nll": [
        (
            {
                "logits": dtype, "target_of": "*i64", "loss": "*fp32", "log_sum": "*fp32", "vocabulary": "i32",
                "ignore_index": "i32",
            },
            {"BLOCK_V": 4096},
        )
        for dtype in ("*bf16", "*fp16", "*fp32")
    ],
    "nll._nll_backward": [
        (
            {
                "logits": dtype, "target_of": "*i64", "log_sum": "*fp32", "grad": "*fp32", "vocabulary": "i32",
                "ignore_index": "i32",
            },
            {"BLOCK_V": 4096},
        )
        for dtype in ("*bf16", "*fp16", "*fp32")
    ],
    "quantize_rows._quantize_rows": [
        (
            {"x": dtype, "codes": codes, "scales": "*fp32", "num_rows": "*i64", "width": "i32"},
            {"IS_COUNTED": counted, "BY_BITS": codes == "*u8", "BLOCKS": 2, "BLOCK": 1024},
        )
        for dtype, counted, codes in (
            ("*bf16", True, "*fp8e4nv"), ("*fp32", False, "*fp8e4nv"), ("*fp16", False, "*u8"),
        )
    ],
    "quantize_rows._quantize_columns": [
        (
            {"weight": dtype, "codes": codes, "scales": "*fp32", "height": "i32", "width": "i32"},
            {"BY_BITS": codes == "*u8", "TILE": 64},
        )
        for dtype, codes in (("*bf16", "*fp8e4nv"), ("*fp32", "*fp8e4nv"), ("*fp16", "*u8"))
    ],
    "weighted_activation_kernels.activate": [
        (
            {
                "hidden": dtype, "bias": dtype, "expert_of": "*i64", "weights": dtype, "num_rows": "*i64",
                "active": dtype, "total": "i32", "width": "i32", "alpha": "fp32", "limit": "fp32",
            },
            {
                "KIND": kind, "IS_GATED": "swiglu" in kind, "HAS_BIAS": full, "HAS_WEIGHTS": full, "IS_COUNTED": full,
                "ROWS": 2048 // block, "BLOCK_F": block,
            },
        )
        for dtype, kind, full, block in (
            ("*bf16", "swiglu", True, 256), ("*fp16", "gelu", True, 512), ("*fp32", "relu", False, 512),
            ("*bf16", "clamped_swiglu", True, 512),
        )
    ],
    "weighted_activation_kernels.activate_backward": [
        (
            {
                "grad": dtype, "hidden": dtype, "bias": dtype, "expert_of": "*i64", "weights": dtype,
                "num_rows": "*i64", "active": dtype, "grad_hidden": dtype, "grad_weights": dtype, "total": "i32",
                "width": "i32", "alpha": "fp32", "limit": "fp32",
            },
            {
                "KIND": kind, "IS_GATED": "swiglu" in kind, "HAS_BIAS": full, "HAS_WEIGHTS": full, "IS_COUNTED": full,
                "ROWS": 2048 // block, "BLOCKS": blocks, "BLOCK_F": block,
            },
        )
        for dtype, kind, full, blocks, block in (
            ("*bf16", "swiglu", True, 3, 256), ("*fp16", "gelu", True, 28, 512), ("*fp32", "relu", False, 1, 512),
            ("*bf16", "clamped_swiglu", True, 6, 512),
        )
    ],
    "sort_rows._count_bins": [
        (
            {
                "ids": "*i64", "kept": "*u8", "counts": "*i32",
                "num_assignments": "i32", "num_blocks": "i32", "num_experts": "i32",
            },
            {"TILES": 16, "TILE_A": 32, "BLOCK_E": block},
        )
        for block in (16, 128)
    ],
    "sort_rows._place_assignments": [
        (
            {
                "ids": "*i64", "kept": "*u8", "ends": "*i64", "assignment_of": "*i64", "row_of": "*i64",
                "num_assignments": "i32", "num_blocks": "i32", "num_experts": "i32",
            },
            {"TILES": 16, "TILE_A": 32},
        )
    ],
    "top_k_kernels.choose_experts": [
        (
            {
                "logits": dtype, "bias": "*fp32", "padding": "*u8", "ids_of": "*i64", "weights_of": dtype,
                "gates_of": "*fp32", "entropy_of": "*fp32", "histogram": "*i64",
                "num_tokens": "i32", "num_experts": "i32", "scale": "fp32",
            },
            {
                "KIND": kind, "TOP_K": top_k, "HAS_BIAS": full, "HAS_PADDING": full, "CHOOSES": chooses,
                "BY_GATES": gates, "TILES": 2, "BLOCK_T": 1024 // experts, "BLOCK_E": experts, "BLOCK_K": top_k,
            },
        )
        for dtype, kind, top_k, full, chooses, gates, experts in (
            ("*bf16", "chosen", 8, False, True, False, 128), ("*fp16", "softmax", 2, True, True, True, 16),
            ("*fp32", "sigmoid", 8, True, True, False, 1024), ("*bf16", "sigmoid", 1, False, False, False, 64),
            ("*bf16", "chosen", 8, True, True, True, 64),
        )
    ],
    "top_k_kernels.pass_back_to_logits": [
        (
            {
                "logits": dtype, "padding": "*u8", "ids_of": "*i64", "grad_weights": dtype, "grad_gates": "*fp32",
                "grad_logits": dtype, "num_tokens": "i32", "num_experts": "i32", "scale": "fp32",
            },
            {
                "KIND": kind, "TOP_K": top_k, "HAS_PADDING": full, "HAS_WEIGHTS": weights, "HAS_GATES": gates,
                "BLOCK_T": 1024 // experts, "BLOCK_E": experts, "BLOCK_K": top_k,
            },
        )
        for dtype, kind, top_k, full, weights, gates, experts in (
            ("*bf16", "chosen", 8, False, True, True, 128), ("*fp16", "softmax", 2, True, True, False, 16),
            ("*fp32", "sigmoid", 8, True, True, True, 1024), ("*bf16", "sigmoid", 1, False, False, True, 64),
        )
    ],
    "sinkhorn._sum_experts": [
        (
            {
                "logits": dtype, "padding": "*u8", "valid": "*i64", "factors": "*fp32", "moving": "*i32",
                "sums": "*fp32", "num_tokens": "i32", "num_experts": "i32",
            },
            {"HAS_PADDING": padded, "TILES": 8, "BLOCK_T": 1024 // experts, "BLOCK_E": experts},
        )
        for dtype, padded, experts in (("*bf16", True, 128), ("*fp32", False, 1024))
    ],
    "sinkhorn._move_factors": [
        (
            {
                "sums": "*fp32", "factors": "*fp32", "moving": "*i32", "programs": "i32", "num_experts": "i32",
                "tolerance": "fp32",
            },
            {"TILES": 16, "ROWS": 16, "BLOCK_E": experts},
        )
        for experts in (16, 1024)
    ],
    "sinkhorn._write_plan": [
        (
            {
                "logits": dtype, "padding": "*u8", "valid": "*i64", "factors": "*fp32", "plan": "*fp32",
                "num_tokens": "i32", "num_experts": "i32",
            },
            {"HAS_PADDING": padded, "BLOCK_T": 1024 // experts, "BLOCK_E": experts},
        )
        for dtype, padded, experts in (("*bf16", True, 128), ("*fp32", False, 1024))
    ],
}  # fmt: skip


def kernels() -> Iterator[tuple[str, Any]]:
    """Every kernel of ``fairseq_moe.fused``, as MODULE.FUNCTION; functions that kernels call are no kernels."""
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    for found in pkgutil.iter_modules(fairseq_moe.fused.__path__):
        module = importlib.import_module(f"fairseq_moe.fused.{found.name}")
        for name, value in vars(module).items():
            is_own = (
                isinstance(value, JITFunction | InterpretedFunction)
                and value.fn.__module__ == module.__name__
            )
            if is_own and not name.startswith("_inner_"):
                yield f"{found.name}.{name}", value


def compile_all() -> Iterator[str]:
    """Compile every call of every kernel to machine code, and tell what does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, kernel in kernels():
        for signature, constants in CALLS[name]:
            types = {**signature, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(fn=kernel, signature=types, constexprs=constants)
            try:
                compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            except Exception as error:
                yield f"{name} {signature} {constants}: {error}"
                continue
            if not compiled.asm["cubin"]:
                yield f"{name} {signature} {constants}: no machine code"
            rough = sorted(set(_ROUGH.findall(compiled.asm["ptx"]))) if name in EXACT else []
            if rough:
                yield f"{name} {signature} {constants}: {', '.join(rough)}"


if __name__ == "__main__":
    problems = list(compile_all())
    print("\n".join(problems) or "all compile")
    sys.exit(1 if problems else 0)
