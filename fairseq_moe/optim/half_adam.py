"""Adam whose two moments are kept in half precision: 4 bytes of state per parameter instead of 8.

Half precision has a narrow range and 11 bits, so three things are done about it:

- Each moment is divided by a power of two of its own, chosen at each step from a bound on its largest value.
  Nothing overflows, and values down to 1e-9 of the largest keep full precision.
- Of the second moment the square root is kept, which doubles the range of the exponent. It is never
  rounded to zero: a small first moment over a vanished second one would make a huge step.
- The second moment changes by a share 1 - beta2 per step, which can be less than half a unit in the last
  place. Rounding to nearest would undo such changes, so it is rounded up or down at random, in proportion,
  which is right on average. The random numbers depend on the step and on the parameter's position only, so
  that replicas stay equal.

All arithmetic is done in float32. ``state_dict`` is that of plain Adam in float32: every number survives the
round trip exactly, experts can be spread over other ranks, and a run may switch between the two optimizers.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.fused.adam import AdamStep
from fairseq_moe.fused.half_adam import (
    HalfScales,
    half_adam_step_,
    half_adam_step_slowly_,
    round_at_random,
)
from fairseq_moe.fused.launch import runs_triton
from fairseq_moe.optim.noted_factor import NotedFactor

__all__ = ["HalfAdam"]

_TOP_EXPONENT = 15  # stored values stay below 2**15, the largest half is almost 2**16
_CHUNK_NUMEL = 1 << 24  # bounds the float32 temporaries of a step
_POSITIONS = 1_000_003  # more than a model has parameters: every step has seeds of its own


class HalfAdam(NotedFactor):
    """Adam with decoupled weight decay, as fairseq's, and half-precision state.

    Args:
        params: parameters or groups of them, of any floating dtype.
        lr: learning rate.
        betas: decay of the first and second moment per step.
        eps: added to the root of the second moment.
        weight_decay: share of a parameter, times lr, that each step takes away.
    """

    # What fairseq's optimizer wrappers ask for.
    supports_memory_efficient_fp16 = True
    supports_flat_params = True
    disable_mem_eff_fp16_loading_hack = True  # it would put the loaded float32 tensors in place of ours

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the loss again.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_kernels, factor, position = self.applies_factor, self.take_factor(), 0
        for group in self.param_groups:
            numbered = enumerate(group["params"], start=position)
            found = [(p, number) for number, p in numbered if p.grad is not None and p.numel() > 0]
            position += len(group["params"])
            if by_kernels and found:
                self._step_by_kernels(found, group, factor)
            else:
                for parameter, number in found:
                    self._step_slowly(parameter, group, number)
        return loss

    @property
    def applies_factor(self) -> bool:
        """Whether kernels step the parameters, and multiply gradients by what was noted."""
        return all(
            runs_triton(p) and p.is_contiguous() for group in self.param_groups for p in group["params"]
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Make or find a parameter's state, and count the step."""
        state = self.state[parameter]
        if not state:
            state.update(_stored(torch.zeros_like(parameter), torch.zeros_like(parameter), step=0))
        state["step"] += 1
        return state

    def _step_slowly(self, parameter: Tensor, group: dict[str, Any], position: int) -> None:
        grad, state = parameter.grad, self._state_of(parameter)
        assert grad is not None
        old = HalfScales(state["exp_avg_scale"], state["root_scale"])
        new = _next_scales(
            group["betas"], old, _largest(state["exp_avg"]), _largest(state["root"]), _largest(grad)
        )
        noise = torch.Generator(parameter.device).manual_seed(state["step"] * _POSITIONS + position)
        step = AdamStep.of_group(group, state["step"])
        chunks = (_chunks(tensor) for tensor in (parameter, grad, state["exp_avg"], state["root"]))
        for values, grad_chunk, exp_avg, root in zip(*chunks, strict=True):
            half_adam_step_slowly_(values, grad_chunk, exp_avg, root, step, old=old, new=new, noise=noise)
        state["exp_avg_scale"], state["root_scale"] = new.exp_avg, new.root

    def _step_by_kernels(
        self, found: list[tuple[Tensor, int]], group: dict[str, Any], factor: Tensor | None
    ) -> None:
        """Step parameters by one kernel each; the scales of all of them are computed together."""
        states = [self._state_of(parameter) for parameter, _ in found]
        grads = [parameter.grad.contiguous() for parameter, _ in found if parameter.grad is not None]
        largest_grad = torch.stack(torch._foreach_norm(grads, math.inf, dtype=torch.float32))
        if factor is not None:
            largest_grad = largest_grad * factor.abs()
        for state in states:
            if "largest_2" not in state:  # new, or loaded
                state["largest_2"] = torch.stack([_largest(state["exp_avg"]), _largest(state["root"])])
        largest_avg, largest_root = torch.stack([state["largest_2"] for state in states]).unbind(1)
        old = HalfScales(*(torch.stack([s[key] for s in states]) for key in ("exp_avg_scale", "root_scale")))
        new = _next_scales(group["betas"], old, largest_avg, largest_root, largest_grad)
        largest_after = torch.zeros(len(found), 2, device=largest_grad.device)
        for index, (parameter, position) in enumerate(found):
            state = states[index]
            half_adam_step_(
                parameter.data,
                grads[index],
                state["exp_avg"],
                state["root"],
                AdamStep.of_group(group, state["step"]),
                old=HalfScales(old.exp_avg[index], old.root[index]),
                new=HalfScales(new.exp_avg[index], new.root[index]),
                largest_2=largest_after[index],
                factor=factor,
                seed=state["step"] * _POSITIONS + position,
            )
            state["exp_avg_scale"], state["root_scale"] = new.exp_avg[index], new.root[index]
            state["largest_2"] = largest_after[index]

    def state_dict(self) -> dict[str, Any]:
        """Write out the state of plain Adam: ``step`` (int), ``exp_avg`` and ``exp_avg_sq`` (float32) per parameter."""
        packed = super().state_dict()
        return {**packed, "state": {index: _plain(state) for index, state in packed["state"].items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of plain Adam; tensors may be on another device."""
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved_ids, parameters, strict=True):
            saved = state_dict["state"].get(index)
            if saved:
                moments = (
                    saved[key].to(parameter.device, torch.float32) for key in ("exp_avg", "exp_avg_sq")
                )
                self.state[parameter] = _stored(*moments, step=int(saved["step"]))


def _next_scales(
    betas: tuple[float, float],
    old: HalfScales,
    largest_avg: Tensor,
    largest_root: Tensor,
    largest_grad: Tensor,
) -> HalfScales:
    """Choose the scales of the next moments by bounds on their largest values, so that one pass is enough.

    Args:
        betas: decays.
        old: scales of what is stored.
        largest_avg: largest magnitude of the stored first moment.
        largest_root: the same of the root.
        largest_grad: largest magnitude of the gradient.
    """
    beta1, beta2 = betas
    next_avg = beta1 * old.exp_avg * largest_avg + (1 - beta1) * largest_grad
    next_root = torch.hypot(math.sqrt(beta2) * old.root * largest_root, math.sqrt(1 - beta2) * largest_grad)
    return HalfScales(_scale_for(next_avg), _scale_for(next_root))


def _stored(exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int) -> dict[str, Any]:
    """Convert plain Adam's moments to the state that this optimizer keeps."""
    root = exp_avg_sq.float().sqrt()
    avg_scale, root_scale = _scale_for(_largest(exp_avg)), _scale_for(_largest(root))
    return {
        "step": step,
        "exp_avg": (exp_avg.float() / avg_scale).half(),
        "root": round_at_random(root / root_scale, torch.Generator(root.device).manual_seed(step)),
        "exp_avg_scale": avg_scale,
        "root_scale": root_scale,
    }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": state["step"],
        "exp_avg": state["exp_avg"].float() * state["exp_avg_scale"],
        "exp_avg_sq": (state["root"].float() * state["root_scale"]).square_(),
    }


def _largest(tensor: Tensor) -> Tensor:
    """Find the largest magnitude in a tensor: float32 scalar."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    lowest, highest = torch.aminmax(tensor)
    return torch.maximum(-lowest, highest).float()


def _scale_for(largest: Tensor) -> Tensor:
    """Choose the power of two that brings values up to ``largest`` below 2**15, also after rounding up."""
    exponent = torch.frexp(largest * (1 + 2.0**-9)).exponent.clamp(min=-100)
    return torch.ldexp(torch.ones_like(largest), exponent - _TOP_EXPONENT)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor along its first axis into views of about ``_CHUNK_NUMEL`` elements."""
    if tensor.dim() == 0:
        tensor = tensor.unsqueeze(0)
    return tensor.split(max(1, _CHUNK_NUMEL * len(tensor) // tensor.numel()))
