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

__all__ = ["HalfAdam"]

_TOP_EXPONENT = 15  # stored values stay below 2**15, the largest half is almost 2**16
_SMALLEST_NORMAL = 2.0**-14
_LOST_BITS = 13  # float32 has 24 bits, half 11
_CHUNK_NUMEL = 1 << 24  # bounds the float32 temporaries of a step


class HalfAdam(torch.optim.Optimizer):
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
        position = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is not None and parameter.numel() > 0:
                    self._update(parameter, grad, group, position)
                position += 1
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], position: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_stored(torch.zeros_like(parameter), torch.zeros_like(parameter), step=0))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        largest_grad = _largest(grad)
        old_scales = state["exp_avg_scale"], state["root_scale"]
        # Bounds on the new values, so that one pass over the data is enough.
        largest_avg = beta1 * old_scales[0] * _largest(state["exp_avg"]) + (1 - beta1) * largest_grad
        largest_root = torch.hypot(
            math.sqrt(beta2) * old_scales[1] * _largest(state["root"]), math.sqrt(1 - beta2) * largest_grad
        )
        new_scales = _scale_for(largest_avg), _scale_for(largest_root)
        noise = torch.Generator(parameter.device).manual_seed(state["step"] * 1_000_003 + position)
        chunks = (_chunks(tensor) for tensor in (parameter, grad, state["exp_avg"], state["root"]))
        for values, grad_chunk, exp_avg, root in zip(*chunks, strict=True):
            _update_chunk(
                values, grad_chunk, exp_avg, root, group, state["step"], old_scales, new_scales, noise
            )
        state["exp_avg_scale"], state["root_scale"] = new_scales

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


def _update_chunk(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    root: Tensor,
    group: dict[str, Any],
    step: int,
    old_scales: tuple[Tensor, Tensor],
    new_scales: tuple[Tensor, Tensor],
    noise: torch.Generator,
) -> None:
    """Update one part of a parameter and of its state, in place."""
    beta1, beta2 = group["betas"]
    grad32 = grad.float()
    avg32 = (exp_avg.float() * old_scales[0]).mul_(beta1).add_(grad32, alpha=1 - beta1)
    square32 = (root.float() * old_scales[1]).square_().mul_(beta2).addcmul_(grad32, grad32, value=1 - beta2)
    root32 = square32.sqrt_()
    values = parameter if parameter.dtype in (torch.float32, torch.float64) else parameter.float()
    if group["weight_decay"] != 0:
        values.add_(values, alpha=-group["weight_decay"] * group["lr"])
    step_size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    values.addcdiv_(avg32.to(values.dtype), (root32 + group["eps"]).to(values.dtype), value=-step_size)
    if values is not parameter:
        parameter.copy_(values)
    exp_avg.copy_(avg32.div_(new_scales[0]))
    root.copy_(_rounded(root32.div_(new_scales[1]), noise))


def _stored(exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int) -> dict[str, Any]:
    """Convert plain Adam's moments to the state that this optimizer keeps."""
    root = exp_avg_sq.float().sqrt()
    avg_scale, root_scale = _scale_for(_largest(exp_avg)), _scale_for(_largest(root))
    return {
        "step": step,
        "exp_avg": (exp_avg.float() / avg_scale).half(),
        "root": _rounded(root / root_scale, torch.Generator(root.device).manual_seed(step)),
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


def _rounded(values: Tensor, noise: torch.Generator) -> Tensor:
    """Round non-negative float32 to half, up or down at random in proportion; only 0 becomes 0.

    Values that half can hold stay as they are.
    """
    normal = values.clamp(min=_SMALLEST_NORMAL)
    random_bits = torch.randint(
        1 << _LOST_BITS, values.shape, dtype=torch.int32, device=values.device, generator=noise
    )
    bits = (normal.view(torch.int32) + random_bits) & -(1 << _LOST_BITS)
    return bits.view(torch.float32).half().masked_fill_(values == 0, 0)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor along its first axis into views of about ``_CHUNK_NUMEL`` elements."""
    if tensor.dim() == 0:
        tensor = tensor.unsqueeze(0)
    return tensor.split(max(1, _CHUNK_NUMEL * len(tensor) // tensor.numel()))
