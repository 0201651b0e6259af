"""A step of fairseq's Adam on CPU, a block of each parameter at a time.

Stock makes nine passes over every parameter and its state. Experts are most of an MoE model's parameters, and the
passes cost as much as a tenth of an update. The same operations in the same order on blocks that stay in the cache
give the same bits from a fraction of the memory traffic.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.fused.adam import AdamStep, adam_step_slowly_

__all__ = ["can_step_in_blocks", "current_state", "step_in_blocks"]

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
                state = current_state(optimizer.state[p], p)
                state["step"] += 1
                tensors = (p.data, p.grad.data, state["exp_avg"], state["exp_avg_sq"])
                step = AdamStep.of_group(group, state["step"])
                for values, grad, exp_avg, exp_avg_sq in _blocks(*tensors):
                    adam_step_slowly_(values, grad, exp_avg, exp_avg_sq, step)


def current_state(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Make or convert the moments of a parameter, in float32 or the parameter's wider precision."""
    dtype = torch.promote_types(p.dtype, torch.float32)
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
