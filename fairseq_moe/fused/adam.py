"""Step fairseq's Adam for one tensor: read parameter, gradient and both moments once, and write once.

The formula is that of ``fairseq.optim.adam.Adam``: decoupled weight decay, and eps beside the root of a moment that is
not corrected for its start. Arithmetic is in float32; a half-precision parameter is rounded once. Stock makes nine
passes, and two more to convert half-precision gradients and parameters; where it steps float32 copies of half-precision
parameters, it copies them back in a further one.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.fused.launch import cdiv, jit, runs_triton, tl

__all__ = ["AdamStep", "adam_step_", "adam_step_slowly_"]

# 16 values for each of 128 threads. Large tensors fill the device with programs, small ones are one program each.
_BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class AdamStep:
    """Hold the numbers of one step of one parameter group.

    Args:
        lr: learning rate.
        betas: decay of the first and second moment per step.
        eps: added to the root of the second moment.
        weight_decay: share of a parameter, times lr, that a step takes away.
        step: number of this step, from 1.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int

    @classmethod
    def of_group(cls, group: dict[str, Any], step: int) -> "AdamStep":
        """Read the numbers from a torch optimizer's parameter group."""
        return cls(
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
        )

    @property
    def size(self) -> float:
        """Learning rate, corrected for moments that started at 0."""
        beta1, beta2 = self.betas
        return self.lr * math.sqrt(1 - beta2**self.step) / (1 - beta1**self.step)

    @property
    def numbers(self) -> tuple[float, ...]:
        """List what kernels are given: size, each beta with its rest to 1, eps, and what decay adds per unit."""
        beta1, beta2 = self.betas
        return self.size, beta1, 1 - beta1, beta2, 1 - beta2, self.eps, -self.weight_decay * self.lr


def adam_step_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamStep,
    *,
    scale: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Step one parameter and its moments, in place.

    Args:
        values: float parameter.
        grad: float, of the same shape.
        exp_avg: float32 (float64 for a float64 parameter), first moment.
        exp_avg_sq: as ``exp_avg``, second moment.
        step: numbers of the step.
        scale: float32 scalar on the device that the gradient is multiplied by; None: 1.
        copy: float tensor of the same shape that gets the stepped parameter too, in its own dtype; None: nothing does.
    """
    tensors = (values, grad, exp_avg, exp_avg_sq)
    all_tensors = tensors if copy is None else (*tensors, copy)
    if not runs_triton(*all_tensors) or not all(tensor.is_contiguous() for tensor in all_tensors):
        adam_step_slowly_(*tensors, step, scale=scale, copy=copy)
        return
    if values.numel() == 0:
        return
    _adam[(cdiv(values.numel(), _BLOCK),)](
        *tensors,
        scale,
        copy,
        values.numel(),
        *step.numbers,
        HAS_SCALE=scale is not None,
        HAS_COPY=copy is not None,
        BLOCK=_BLOCK,
    )


@jit
def _adam(
    values: tl.tensor,
    grads: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    scale: tl.tensor,
    copies: tl.tensor,
    numel: tl.tensor,
    step_size: tl.tensor,
    beta1: tl.tensor,
    share1: tl.tensor,
    beta2: tl.tensor,
    share2: tl.tensor,
    eps: tl.tensor,
    decay: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(scale)
    average = tl.load(exp_avg + at, mask=inside, other=0.0) * beta1 + grad * share1
    square = tl.load(exp_avg_sq + at, mask=inside, other=0.0) * beta2 + grad * grad * share2
    tl.store(exp_avg + at, average, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
    value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    value += value * decay
    # Rounded as torch does: what Triton makes of / and sqrt is an approximation, which takes the smallest for 0.
    value -= tl.div_rn(step_size * average, tl.sqrt_rn(square) + eps)
    tl.store(values + at, value.to(values.dtype.element_ty), mask=inside)
    if HAS_COPY:
        tl.store(copies + at, value.to(copies.dtype.element_ty), mask=inside)


def adam_step_slowly_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamStep,
    *,
    scale: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Compute ``adam_step_`` in plain torch: without a scale the operations of stock's Adam, to the bit."""
    beta1, beta2 = step.betas
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if scale is not None:
        grad = grad * scale.to(grad.dtype)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().add_(step.eps)
    if step.weight_decay != 0:
        wide.add_(wide, alpha=-step.weight_decay * step.lr)
    wide.addcdiv_(exp_avg, denominator, value=-step.size)
    if wide is not values:
        values.copy_(wide)
    if copy is not None:
        copy.copy_(wide)
