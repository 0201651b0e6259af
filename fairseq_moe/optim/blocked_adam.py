"""A step of fairseq's Adam on CPU, a block of each parameter at a time.

Stock makes nine passes over every parameter and its state. Experts are most of an MoE model's parameters, and the
passes cost as much as a tenth of an update. The same operations in the same order on blocks that stay in the cache
give the same bits from a fraction of the memory traffic.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_step_in_blocks", "step_in_blocks"]

_HALF = (torch.float16, torch.bfloat16)
_BLOCK_NUMEL = 1 << 17


def can_step_in_blocks(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether every parameter of ``optimizer`` (fairseq's Adam) is on CPU with a dense gradient; no amsgrad."""
    return all(
        not group.get("amsgrad", False)
        and all(p.device.type == "cpu" and (p.grad is None or not p.grad.is_sparse) for p in group["params"])
        for group in optimizer.param_groups
    )


@torch.no_grad()
def step_in_blocks(optimizer: torch.optim.Optimizer) -> None:
    """Step fairseq's Adam, state included, for parameters that ``can_step_in_blocks`` has admitted."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                state = _current_state(optimizer.state[p], p)
                state["step"] += 1
                tensors = (p.data, p.grad.data, state["exp_avg"], state["exp_avg_sq"])
                for values, grad, exp_avg, exp_avg_sq in _blocks(*tensors):
                    _update(values, grad, exp_avg, exp_avg_sq, group, state["step"])


def _current_state(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Make or convert the moments of a parameter, in float32 or the parameter's wider precision."""
    dtype = torch.float32 if p.dtype in _HALF else p.dtype
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(p.data, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(p.data, dtype=dtype)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name].to(p.device, dtype)
    return state


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    yield from zip(*(tensor.view(-1).split(_BLOCK_NUMEL) for tensor in tensors), strict=True)


def _update(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: dict[str, Any], step: int
) -> None:
    beta1, beta2 = group["betas"]
    grad = grad.float() if grad.dtype in _HALF else grad
    values = p.float() if p.dtype in _HALF else p
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().add_(group["eps"])
    step_size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    if group["weight_decay"] != 0:
        values.add_(values, alpha=-group["weight_decay"] * group["lr"])
    values.addcdiv_(exp_avg, denominator, value=-step_size)
    if values is not p:
        p.copy_(values)
