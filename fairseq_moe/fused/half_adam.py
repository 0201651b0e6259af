"""Step Adam with half-precision moments for one tensor: read everything once, write it once, rounded at random.

``optim.half_adam`` says what is stored and why. The kernel also finds the largest of the values that it stores, from
which the next step's scales follow, so that only the gradient's largest value takes a pass of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_moe.fused.adam import AdamStep
from fairseq_moe.fused.launch import cdiv, jit, tl

__all__ = ["HalfScales", "half_adam_step_", "half_adam_step_slowly_", "round_at_random"]

_SMALLEST_NORMAL = 2.0**-14
_LOST_BITS = 13  # float32 has 24 bits, half 11
# Four tiles for a program, because one call of the generator gives four random numbers.
_TILE = 1024


class HalfScales(NamedTuple):
    """Hold what the two moments are divided by: float32 scalars on the device.

    Args:
        exp_avg: of the first moment.
        root: of the second moment's root.
    """

    exp_avg: Tensor
    root: Tensor


def half_adam_step_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    root: Tensor,
    step: AdamStep,
    *,
    old: HalfScales,
    new: HalfScales,
    largest_2: Tensor,
    factor: Tensor | None,
    seed: int,
) -> None:
    """Step one parameter and its moments, in place, by the kernel; all tensors are contiguous.

    Args:
        values: float parameter, on a device where kernels run.
        grad: float gradient.
        exp_avg: float16, first moment divided by ``old.exp_avg``.
        root: float16, root of the second moment divided by ``old.root``.
        step: numbers of the step.
        old: scales of what is stored.
        new: scales of what will be.
        largest_2: float32 zeros; the largest of what was stored, first moment and root, is written there.
        factor: float32 scalar that the gradient is multiplied by; None: 1.
        seed: of the random rounding, the same on all ranks that hold the parameter.
    """
    if values.numel() == 0:
        return
    _half_adam[(cdiv(values.numel(), 4 * _TILE),)](
        values,
        grad,
        exp_avg,
        root,
        old.exp_avg,
        old.root,
        new.exp_avg,
        new.root,
        largest_2,
        factor,
        values.numel(),
        seed,
        *step.numbers,
        HAS_FACTOR=factor is not None,
        TILE=_TILE,
    )


@jit
def _half_adam(
    values: tl.tensor,
    grads: tl.tensor,
    exp_avg: tl.tensor,
    root: tl.tensor,
    old_avg_scale: tl.tensor,
    old_root_scale: tl.tensor,
    new_avg_scale: tl.tensor,
    new_root_scale: tl.tensor,
    largest: tl.tensor,
    factor: tl.tensor,
    numel: tl.tensor,
    seed: tl.tensor,
    step_size: tl.tensor,
    beta1: tl.tensor,
    share1: tl.tensor,
    beta2: tl.tensor,
    share2: tl.tensor,
    eps: tl.tensor,
    decay: tl.tensor,
    HAS_FACTOR: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    # Counters of the generator are of 32 bits: they repeat after 4 * 2**32 values, more than any tensor has.
    random0, random1, random2, random3 = tl.randint4x(seed, (program * TILE + lane).to(tl.uint32))
    avg_from, root_from = tl.load(old_avg_scale), tl.load(old_root_scale)
    # Scales are powers of two, so that products with their inverses are exact: a value that stays is not rounded.
    avg_to, root_to = tl.div_rn(1.0, tl.load(new_avg_scale)), tl.div_rn(1.0, tl.load(new_root_scale))
    times = tl.load(factor) if HAS_FACTOR else 1.0
    largest_avg = tl.zeros((TILE,), tl.float32)
    largest_root = tl.zeros((TILE,), tl.float32)
    for part in tl.static_range(4):
        if part == 0:
            random = random0
        elif part == 1:
            random = random1
        elif part == 2:
            random = random2
        else:
            random = random3
        at = (program * 4 + part) * TILE + lane
        inside = at < numel
        grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32) * times
        average = (
            tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32) * avg_from * beta1 + grad * share1
        )
        before = tl.load(root + at, mask=inside, other=0.0).to(tl.float32) * root_from
        rooted = tl.sqrt_rn(before * before * beta2 + grad * grad * share2)
        value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        value += value * decay
        value -= tl.div_rn(step_size * average, rooted + eps)
        tl.store(values + at, value.to(values.dtype.element_ty), mask=inside)
        stored_avg = (average * avg_to).to(tl.float16)
        # Up or down at random, in proportion to the 13 bits that half precision has no room for; never to 0.
        scaled = rooted * root_to
        bits = tl.maximum(scaled, 6.103515625e-05).to(tl.uint32, bitcast=True)
        bits = (bits + (random.to(tl.uint32, bitcast=True) & 0x1FFF)) & 0xFFFFE000
        rounded = bits.to(tl.float32, bitcast=True)
        stored_root = tl.where(scaled == 0.0, 0.0, rounded).to(tl.float16)
        tl.store(exp_avg + at, stored_avg, mask=inside)
        tl.store(root + at, stored_root, mask=inside)
        largest_avg = tl.maximum(largest_avg, tl.abs(stored_avg.to(tl.float32)))
        largest_root = tl.maximum(largest_root, stored_root.to(tl.float32))
    # The largest is the same in whatever order programs come, so nothing has to be ordered.
    tl.atomic_max(largest, tl.max(largest_avg, axis=0), sem="relaxed")
    tl.atomic_max(largest + 1, tl.max(largest_root, axis=0), sem="relaxed")


def half_adam_step_slowly_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    root: Tensor,
    step: AdamStep,
    *,
    old: HalfScales,
    new: HalfScales,
    noise: torch.Generator,
) -> None:
    """Compute ``half_adam_step_`` in plain torch, with the random bits of ``noise``."""
    beta1, beta2 = step.betas
    grad32 = grad.float()
    avg32 = (exp_avg.float() * old.exp_avg).mul_(beta1).add_(grad32, alpha=1 - beta1)
    square32 = (root.float() * old.root).square_().mul_(beta2).addcmul_(grad32, grad32, value=1 - beta2)
    root32 = square32.sqrt_()
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if step.weight_decay != 0:
        wide.add_(wide, alpha=-step.weight_decay * step.lr)
    wide.addcdiv_(avg32.to(wide.dtype), (root32 + step.eps).to(wide.dtype), value=-step.size)
    if wide is not values:
        values.copy_(wide)
    exp_avg.copy_(avg32.div_(new.exp_avg))
    root.copy_(round_at_random(root32.div_(new.root), noise))


def round_at_random(values: Tensor, noise: torch.Generator) -> Tensor:
    """Round non-negative float32 to half, up or down at random in proportion; only 0 becomes 0.

    Values that half can hold stay as they are.
    """
    normal = values.clamp(min=_SMALLEST_NORMAL)
    random_bits = torch.randint(
        1 << _LOST_BITS, values.shape, dtype=torch.int32, device=values.device, generator=noise
    )
    bits = (normal.view(torch.int32) + random_bits) & -(1 << _LOST_BITS)
    return bits.view(torch.float32).half().masked_fill_(values == 0, 0)
