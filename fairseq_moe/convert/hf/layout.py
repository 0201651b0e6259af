"""Say how one expert's weights lie on Hugging Face's side where that is not our way, and turn them: pure functions.

Ours are the rows of a matrix, one for each output: those of the gate, then those of up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OUR_WAY", "Layout", "put", "stored_shape", "take"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Describe how the tensors of a stack of experts lie, each expert alike.

    Args:
        transposed: outputs are columns.
        interleaved: the outputs of gate and up alternate: even ones are the gate's, odd ones those of up.
    """

    transposed: bool = False
    interleaved: bool = False


OUR_WAY = Layout()


def stored_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Give the shape on Hugging Face's side of a stack of ours, (E, outputs, inputs) or (E, outputs)."""
    return (*shape[:-2], shape[-1], shape[-2]) if layout.transposed else shape


def take(stored: Tensor, layout: Layout) -> Tensor:
    """Turn one expert's tensor into ours.

    Args:
        stored: (inputs, outputs) if it is transposed, else (outputs, inputs) or (outputs,).
        layout: how it lies.

    Returns:
        (outputs, inputs) or (outputs,); a view where that is possible.
    """
    rows = stored.T if layout.transposed else stored
    return torch.cat([rows[0::2], rows[1::2]]) if layout.interleaved else rows


def put(ours: Tensor, layout: Layout) -> Tensor:
    """Turn one expert's tensor of ours, (outputs, inputs) or (outputs,), into what ``take`` would make it of."""
    rows = ours
    if layout.interleaved:
        half = ours.shape[0] // 2
        rows = torch.stack([ours[:half], ours[half:]], dim=1).flatten(0, 1)
    return rows.T if layout.transposed else rows
