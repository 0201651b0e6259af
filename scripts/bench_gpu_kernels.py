"""The fused kernels, and the optimizers, with inputs of real sizes for bench_gpu.py."""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.fused import (
    add_bias,
    add_rows,
    nll,
    quantize_rows,
    sinkhorn,
    sort_rows,
    top_k,
    weighted_activation,
)
from fairseq_moe.fused.adam import AdamStep, adam_step_, adam_step_slowly_
from fairseq_moe.fused.weighted_activation import ActivationKind, Clamp

__all__ = ["KernelCase", "kernel_cases", "optimizer_steps"]


@dataclass(frozen=True)
class KernelCase:
    """A kernel, its twin, and the bytes that must be read and written."""

    name: str
    fused: Callable[[], Any]
    slow: Callable[[], Any]
    num_bytes: int


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class _Inputs:
    """T tokens with K choices, of width D; E experts of hidden width F; V words. All in bfloat16."""

    device: torch.device
    tokens: int = 16384
    top_k: int = 8
    width: int = 2048
    hidden: int = 768
    experts: int = 128
    words: int = 51_200

    @property
    def rows(self) -> int:
        """Rows of the experts."""
        return self.tokens * self.top_k

    def random(self, *shape: int) -> Tensor:
        """Normal values."""
        return torch.randn(shape, device=self.device).bfloat16()


def kernel_cases(device: torch.device, *, is_small: bool) -> Iterator[KernelCase]:
    """Make the cases one after the other, so that they do not take memory together."""
    given = _Inputs(device)
    if is_small:
        given = replace(given, tokens=8, top_k=2, width=16, hidden=16, experts=4, words=60)
    yield from _of_routing(given)
    yield from _of_rows(given)
    yield from _of_activations(given)
    yield from _of_weights(given)
    if device.type == "cuda":  # these take no twin by themselves
        yield from _of_words(given)


def _of_routing(given: _Inputs) -> Iterator[KernelCase]:
    ids = torch.randint(given.experts, (given.tokens, given.top_k), device=given.device)
    kept = torch.ones_like(ids, dtype=torch.bool)
    yield KernelCase(
        "counting sort of assignments",
        lambda: sort_rows.sort_assignments(ids, kept, num_experts=given.experts),
        lambda: sort_rows.sort_assignments_slowly(ids, kept, num_experts=given.experts),
        _bytes(ids, kept) + 2 * _bytes(ids),
    )
    logits, scoring = (
        given.random(given.tokens, given.experts),
        top_k.Scoring(kind="chosen", top_k=given.top_k),
    )
    yield KernelCase(
        "choice of experts",
        lambda: top_k.top_k(logits, scoring),
        lambda: top_k.top_k_slowly(logits, scoring),
        3 * _bytes(logits) + 2 * _bytes(ids),
    )
    yield KernelCase(
        "plan of Sinkhorn, 20 iterations",
        lambda: sinkhorn.sinkhorn_plan(logits),
        lambda: sinkhorn.sinkhorn_plan_slowly(logits),
        23 * _bytes(logits),
    )


def _of_rows(given: _Inputs) -> Iterator[KernelCase]:
    rows, width = given.rows, given.width
    y, weights, grad = given.random(rows, width), given.random(rows), given.random(given.tokens, width)
    row_of = torch.randperm(rows, device=given.device).view(given.tokens, given.top_k)
    token_of = torch.arange(rows, device=given.device) // given.top_k
    bias = given.random(given.experts, width)
    expert_of = torch.arange(rows, device=given.device) * given.experts // rows
    yield KernelCase(
        "sum of a token's rows",
        lambda: add_rows.add_rows(y, row_of),
        lambda: add_rows.add_rows_slowly(y, row_of),
        _bytes(y, row_of) + _bytes(grad),
    )
    yield KernelCase(
        "gradient of the weighted sum",
        lambda: add_rows.spread_rows(grad, token_of, y, weights),
        lambda: add_rows.spread_rows_slowly(grad, token_of, y, weights),
        3 * _bytes(y),
    )
    yield KernelCase(
        "bias of the rows",
        lambda: add_bias.add_bias_(y, bias, expert_of, weights_R=weights),
        lambda: add_bias.add_bias_slowly_(y, bias, expert_of, weights_R=weights),
        2 * _bytes(y),
    )
    yield KernelCase(
        "rows to FP8",
        lambda: quantize_rows.quantize_rows(y),
        lambda: quantize_rows.quantize_rows_slowly(y),
        _bytes(y) * 3 // 2,
    )


def _of_activations(given: _Inputs) -> Iterator[KernelCase]:
    rows, hidden = given.rows, given.hidden
    options: dict[str, Any] = {"weights_R": given.random(given.rows)}
    for kind in ActivationKind:
        h, g = given.random(rows, hidden * (2 if kind.is_gated else 1)), given.random(rows, hidden)
        if kind is ActivationKind.CLAMPED_SWIGLU:
            options["clamp"] = Clamp(alpha=1.702, limit=7.0)
        yield KernelCase(
            f"weighted {kind}",
            lambda kind=kind, h=h: weighted_activation.weighted_activation(kind, h, **options),
            lambda kind=kind, h=h: weighted_activation.weighted_activation_slowly(kind, h, **options),
            _bytes(h, g),
        )
        yield KernelCase(
            f"weighted {kind}, backward",
            lambda kind=kind, h=h, g=g: weighted_activation.weighted_activation_backward(
                kind, g, h, **options
            ),
            lambda kind=kind, h=h, g=g: weighted_activation.weighted_activation_backward_slowly(
                kind, g, h, **options
            ),
            2 * _bytes(h, g),
        )


def _of_weights(given: _Inputs) -> Iterator[KernelCase]:
    weight = given.random(given.experts, given.hidden, given.width)
    yield KernelCase(
        "columns to FP8",
        lambda: quantize_rows.quantize_columns(weight),
        lambda: quantize_rows.quantize_rows_slowly(weight.transpose(1, 2).reshape(-1, given.hidden)),
        _bytes(weight) * 3 // 2,
    )
    values, step = weight.float(), AdamStep(lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, step=9)
    moments = torch.zeros_like(values), torch.zeros_like(values)
    yield KernelCase(
        "Adam of bfloat16 parameters",
        lambda: adam_step_(weight, weight, *moments, step),
        lambda: adam_step_slowly_(weight, weight, *moments, step),
        3 * _bytes(weight) + 2 * _bytes(*moments),
    )


def _of_words(given: _Inputs) -> Iterator[KernelCase]:
    words = given.random(8192, given.words)
    target = torch.randint(given.words, (8192,), device=given.device)
    yield KernelCase(
        "likelihood of 51,200 words",
        lambda: nll.nll(words, target, ignore_index=-1),
        lambda: nll.nll_slowly(words, target, ignore_index=-1),
        _bytes(words),
    )
    (_, log_sum), one = nll.nll(words, target, ignore_index=-1), torch.ones((), device=given.device)
    yield KernelCase(
        "likelihood, backward",
        lambda: nll.nll_backward_(words, target, log_sum, one, ignore_index=-1),
        lambda: nll.nll_backward_slowly(words, target, log_sum, one, ignore_index=-1),
        2 * _bytes(words),
    )


def optimizer_steps(
    device: torch.device, shapes: list[tuple[int, ...]]
) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Make the optimizers one after the other: a name, a step, and the number of parameters."""

    def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    num = sum(torch.Size(shape).numel() for shape in shapes)
    if device.type == "cuda":
        yield "torch fused Adam, float32", torch.optim.Adam(parameters(torch.float32), fused=True).step, num
    from fairseq_moe.optim import HalfAdam

    for dtype in (torch.float32, torch.bfloat16):
        yield f"HalfAdam, {str(dtype).removeprefix('torch.')}", HalfAdam(parameters(dtype)).step, num
    if importlib.util.find_spec("fairseq") is None:
        return
    from fairseq.optim.adam import Adam

    from fairseq_moe.optim.one_pass_adam import step_in_one_pass

    stock_step = inspect.unwrap(Adam.step)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        optimizer = Adam(parameters(dtype))
        yield f"stock Adam, {name}", functools.partial(stock_step, optimizer), num
        step_in_one_pass(optimizer)
        yield f"{type(optimizer).__name__}, {name}", optimizer.step, num
        del optimizer
