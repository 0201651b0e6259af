"""Call every fused kernel, and its twin, with inputs of any size on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.fused.adam import AdamStep, adam_step_
from fairseq_moe.fused.add_bias import add_bias_
from fairseq_moe.fused.add_rows import add_rows, spread_rows
from fairseq_moe.fused.grouped_product import (
    grouped_grad_rows,
    grouped_grad_weight,
    grouped_outputs,
    row_tiles,
)
from fairseq_moe.fused.half_adam import HalfScales, half_adam_step_, half_adam_step_slowly_
from fairseq_moe.fused.nll import nll, nll_backward_, nll_backward_slowly, nll_slowly
from fairseq_moe.fused.quantize_rows import quantize_columns, quantize_rows
from fairseq_moe.fused.sinkhorn import sinkhorn_plan
from fairseq_moe.fused.sort_rows import sort_assignments
from fairseq_moe.fused.top_k import Scoring, top_k
from fairseq_moe.fused.weighted_activation import (
    ActivationKind,
    Clamp,
    weighted_activation,
    weighted_activation_backward,
)
from tests.helpers.kernel_comparison import Found, KernelCase, Make, Sizes, without_kernels

__all__ = ["CASES"]

_STEP = AdamStep(lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, step=3)
Maker = Callable[[Make, Sizes], KernelCase]
CASES: dict[str, Maker] = {}


def _case(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        CASES[name] = maker
        return maker

    return add


@_case("add_rows")
def _add_rows(make: Make, size: Sizes) -> KernelCase:
    rows, row_of = make(size.rows, size.width), make.rows_of_tokens(size)
    return KernelCase(lambda: (add_rows(rows, row_of),))


@_case("add_rows, weighted")
def _add_weighted_rows(make: Make, size: Sizes) -> KernelCase:
    rows, weights, row_of = make(size.rows, size.width), make(size.rows), make.rows_of_tokens(size)
    return KernelCase(lambda: (add_rows(rows, row_of, weights_R=weights),))


@_case("spread_rows")
def _spread_rows(make: Make, size: Sizes) -> KernelCase:
    grad, rows, weights = make(size.tokens, size.width), make(size.rows, size.width), make(size.rows)
    token_of = make.below(size.tokens, size.rows)
    return KernelCase(lambda: spread_rows(grad, token_of, rows, weights))


@_case("add_bias")
def _add_bias(make: Make, size: Sizes) -> KernelCase:
    rows, bias, weights = make(size.rows, size.width), make(size.experts, size.width), make(size.rows)
    expert_of = make.experts_of_rows(size)
    return KernelCase(lambda: (add_bias_(rows.clone(), bias, expert_of, weights_R=weights),))


def _activation(kind: ActivationKind, *, backward: bool, full: bool) -> Maker:
    def maker(make: Make, size: Sizes) -> KernelCase:
        width = size.hidden * (2 if kind.is_gated else 1)
        hidden, grad = make(size.rows, width), make(size.rows, size.hidden)
        options: dict[str, Any] = {"weights_R": make(size.rows)}
        if kind is ActivationKind.CLAMPED_SWIGLU:
            options["clamp"] = Clamp(alpha=1.702, limit=0.75)  # which half of the values exceed
        present = size.rows
        if full:
            present = size.rows * 9 // 10
            hidden[present:] = grad[present:] = float("nan")  # nobody's
            options |= {"bias_LH": make(size.experts, width), "expert_R": make.experts_of_rows(size)}
            options["num_rows"] = torch.tensor(present, device=make.device)

        def run() -> Found:
            if not backward:
                return (weighted_activation(kind, hidden, **options)[:present],)
            active, grad_hidden, grad_weights = weighted_activation_backward(kind, grad, hidden, **options)
            return active[:present], grad_hidden[:present], grad_weights

        return KernelCase(run)

    return maker


for _kind in ActivationKind:
    CASES[f"weighted_activation, {_kind}"] = _activation(_kind, backward=False, full=False)
    CASES[f"weighted_activation, {_kind}, bias, counted"] = _activation(_kind, backward=False, full=True)
    CASES[f"weighted_activation, {_kind}, backward"] = _activation(_kind, backward=True, full=False)
    CASES[f"weighted_activation, {_kind}, backward, bias, counted"] = _activation(
        _kind, backward=True, full=True
    )


@_case("grouped_product")
def _grouped_product(make: Make, size: Sizes) -> KernelCase:
    x, grad = make(size.rows, size.width), make(size.rows, size.hidden)
    weight, counts = make(size.experts, size.hidden, size.width), make.counts(size)
    present = int(counts.sum())
    x[present:] = grad[present:] = float("nan")  # nobody's
    tiles = row_tiles(counts, dtype=make.dtype)

    def run() -> Found:
        return (
            grouped_outputs(x, weight, tiles)[:present],
            grouped_grad_rows(grad, weight, tiles)[:present],
            grouped_grad_weight(grad, x, tiles),
        )

    return KernelCase(run)


@_case("adam")
def _adam(make: Make, size: Sizes) -> KernelCase:
    shape = size.experts, size.hidden, size.width
    start = [make(*shape), make(*shape), make(*shape, dtype=torch.float32)]
    start.append(make(*shape, dtype=torch.float32).square())
    scale = torch.tensor(0.25, device=make.device)

    def run() -> Found:
        values, grad, exp_avg, exp_avg_sq = (tensor.clone() for tensor in start)
        adam_step_(values, grad, exp_avg, exp_avg_sq, _STEP, scale=scale)
        return values, grad, exp_avg, exp_avg_sq

    return KernelCase(run)


@_case("half_adam")
def _half_adam(make: Make, size: Sizes) -> KernelCase:
    shape = size.experts, size.hidden, size.width
    start = [make(*shape), make(*shape), make(*shape, dtype=torch.float16)]
    start.append(make(*shape, dtype=torch.float16).abs())
    factor = torch.tensor(0.25, device=make.device)
    old, new = (
        HalfScales(*torch.tensor(pair, device=make.device)) for pair in ((0.01, 0.02), (0.015, 0.025))
    )
    noise = torch.Generator(make.device).manual_seed(0)

    def run() -> Found:
        values, grad, exp_avg, root = (tensor.clone() for tensor in start)
        largest = torch.zeros(2, device=make.device)
        half_adam_step_(
            values,
            grad,
            exp_avg,
            root,
            _STEP,
            old=old,
            new=new,
            largest_2=largest,
            factor=factor,
            seed=7,
        )
        return values, exp_avg, root, largest

    def twin() -> Found:
        values, grad, exp_avg, root = (tensor.clone() for tensor in start)
        half_adam_step_slowly_(
            values, grad.float() * factor, exp_avg, root, _STEP, old=old, new=new, noise=noise
        )
        largest = torch.stack([exp_avg.float().abs().max(), root.float().max()])
        return values, exp_avg, root, largest

    # A place of half precision is a 1024th of the value. Roots are rounded up or down at random, and so is the largest;
    # a GPU divides less exactly, which rounds few of the first moments otherwise.
    return KernelCase(run, twin, {1: (2.0**-10, 2e-3), 2: (2.0**-9, 1.0), 3: (2.0**-9, 1.0)})


@_case("nll")
def _nll(make: Make, size: Sizes) -> KernelCase:
    tokens = max(size.tokens // 4, 3)
    logits, target = make(tokens, size.words) * 3, make.below(size.words, tokens)
    target[::7] = 1
    grad = torch.tensor(0.5, device=make.device)

    def run() -> Found:
        loss, log_sum = nll(logits, target, ignore_index=1)
        return loss, log_sum, nll_backward_(logits.clone(), target, log_sum, grad, ignore_index=1)

    def twin() -> Found:
        loss, log_sum = nll_slowly(logits, target, ignore_index=1)
        return loss, log_sum, nll_backward_slowly(logits, target, log_sum, grad, ignore_index=1)

    return KernelCase(run, twin)


def _of_codes(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales.unsqueeze(-1)


@_case("quantize_rows")
def _quantize_rows(make: Make, size: Sizes) -> KernelCase:
    x = make(size.rows, size.width)

    def run() -> Found:
        codes, scales = quantize_rows(x)
        return _of_codes(codes, scales), scales

    return KernelCase(run)


@_case("quantize_columns")
def _quantize_columns(make: Make, size: Sizes) -> KernelCase:
    weight = make(size.experts, size.hidden, size.width)

    def run() -> Found:
        codes, scales = quantize_columns(weight)
        return _of_codes(codes, scales), scales

    return KernelCase(run)


@_case("sort_rows")
def _sort_rows(make: Make, size: Sizes) -> KernelCase:
    ids, kept = (
        make.below(size.experts, size.tokens, size.top_k),
        make.below(5, size.tokens, size.top_k) > 0,
    )
    return KernelCase(lambda: sort_assignments(ids, kept, num_experts=size.experts))


def _top_k(kind: str, *, full: bool) -> Maker:
    def maker(make: Make, size: Sizes) -> KernelCase:
        scoring = Scoring(kind=kind, top_k=min(size.top_k, size.experts), scale=1.5)
        logits = (make(size.tokens, size.experts) * 2).requires_grad_()
        bias = make(size.experts, dtype=torch.float32) * 0.1 if full else None
        padding = make.below(9, size.tokens) == 0 if full else None
        upper = make(size.tokens, scoring.top_k), make(size.tokens, size.experts, dtype=torch.float32)
        options = {"bias_E": bias, "padding_T": padding}
        with without_kernels():
            given = top_k(logits, scoring, **options).ids_TK

        def run() -> Found:
            chosen = top_k(logits, scoring, **options)
            assert chosen.histogram_34E is not None
            obeyed = top_k(logits, scoring, **options, ids_TK=given)
            (grad,) = torch.autograd.grad([obeyed.weights_TK, obeyed.gates_TE], logits, upper)
            counted = chosen.ids_TK if padding is None else chosen.ids_TK[~padding]
            miscounted = chosen.histogram_34E[:, 0].sum(0) - counted.flatten().bincount(
                minlength=size.experts
            )
            values = (obeyed.weights_TK, obeyed.gates_TE, obeyed.entropy_T)
            return *(value.detach() for value in values), grad, miscounted, chosen.ids_TK

        # Scores that rounding alone makes equal, or not, may change places.
        return KernelCase(run, loose={5: (0.0, 1e-3)})

    return maker


for _scores in ("chosen", "softmax", "sigmoid"):
    CASES[f"top_k, {_scores}"] = _top_k(_scores, full=False)
    CASES[f"top_k, {_scores}, bias, padding"] = _top_k(_scores, full=True)


@_case("sinkhorn")
def _sinkhorn(make: Make, size: Sizes) -> KernelCase:
    logits, padding = make(size.tokens, size.experts), make.below(5, size.tokens) == 0
    # Where the iterations stop is a comparison, which rounding may turn over.
    return KernelCase(
        lambda: (sinkhorn_plan(logits), sinkhorn_plan(logits, padding_T=padding)),
        loose={0: (1e-3, 1.0), 1: (1e-3, 1.0)},
    )
