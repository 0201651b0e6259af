"""Step fairseq's Adam on a GPU with one kernel for each parameter."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from fairseq.optim.adam import Adam
from torch import Tensor

from fairseq_moe.fused.adam import AdamStep, adam_step_
from fairseq_moe.fused.launch import runs_triton
from fairseq_moe.optim.blocked_adam import current_state
from fairseq_moe.optim.noted_factor import NotedFactor

__all__ = ["OnePassAdam", "step_in_one_pass"]


class OnePassAdam(NotedFactor, Adam):
    """Step every parameter in one pass; state and formula are those of stock's Adam.

    An instance is a stock Adam whose class was changed: see ``step_in_one_pass``.

    Attributes:
        copies: the half-precision parameter of each float32 one that has one; a step writes both.
    """

    copies: Mapping[Tensor, Tensor] = MappingProxyType({})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the loss again.

        Returns:
            the closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor = self.take_factor()
        if self._is_stocks():
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.grad = p.grad if factor is None else p.grad * factor
            super().step()
            for p in self.copies:
                self.copies[p].data.copy_(p)
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = current_state(self.state[p], p)
                    state["step"] += 1
                    step = AdamStep.of_group(group, state["step"])
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    # Looked up now: sharding gives a parameter other data at times.
                    copy = self.copies[p].data if p in self.copies else None
                    adam_step_(p.data, p.grad.data, *moments, step, scale=factor, copy=copy)
        return loss

    def _is_stocks(self) -> bool:
        """Tell whether stock must step: for amsgrad, which overrides may ask for, or to refuse sparse gradients."""
        return any(
            group.get("amsgrad") or any(p.grad is not None and p.grad.is_sparse for p in group["params"])
            for group in self.param_groups
        )


def step_in_one_pass(optimizer: Any, copies: Mapping[Tensor, Tensor] = OnePassAdam.copies) -> None:
    """Let a stock Adam step in one pass from now on, in place, where kernels take all of its parameters.

    Args:
        optimizer: any; others stay what they are.
        copies: the half-precision parameter of each float32 one that has one.
    """
    if type(optimizer) is not Adam or any(group.get("amsgrad") for group in optimizer.param_groups):
        return
    if all(runs_triton(p) for group in optimizer.param_groups for p in group["params"]):
        optimizer.__class__ = OnePassAdam
        optimizer.copies = copies
