"""Weights that are not finite, or no longer are in a narrower dtype, are refused by name while they are copied."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe.errors import CheckpointError

__all__ = ["refuse_not_finite"]


def refuse_not_finite(
    tensor: Tensor,
    *,
    name: str,
    file: Path,
    before: Callable[[], Tensor] | None = None,
    flag: str = "",
) -> None:
    """Refuse NaN and infinity.

    Args:
        tensor: to be written.
        name: of the tensor in ``file``.
        file: it was read from.
        before: makes what it was before it was rounded to its dtype, if it was.
        flag: that has chosen this dtype.

    Raises:
        CheckpointError: names tensor, file and the first such value.
    """
    if _is_finite(tensor):
        return
    bad = ~tensor.isfinite()
    values = (tensor if before is None else before())[bad]
    value, plural = float(values[0]), "value" if tensor.numel() == 1 else "values"
    if math.isfinite(value):
        dtype = str(tensor.dtype).removeprefix("torch.")
        problem = f"which {dtype} cannot hold; give another {flag}."
    else:
        problem = "expected finite weights; fetch the file again, or take the weights of another checkpoint."
    raise CheckpointError(
        f"{file} has {name} with the value {value} ({len(values)} of {tensor.numel()} {plural}), {problem}"
    )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    # The extremes of anything with NaN are NaN. Ten times as fast as isfinite, which makes two more tensors.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
