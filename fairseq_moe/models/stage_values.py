"""Hand values from one stage of a pipeline to the next: hidden values, and what the experts of earlier layers say.

The last stage thus has the losses and counts of all layers, with gradients, and computes one model's loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_moe.modules import LOSSES, MoEAux
from fairseq_moe.modules.routing.stats import MEASURES

__all__ = ["SideTensor", "StageInput", "StageOutput"]


@dataclass(frozen=True, kw_only=True)
class StageInput:
    """Hold what a stage computes from.

    Args:
        virtual: which of this rank's stages.
        x_BSD: float, hidden values of this rank's own tokens; None: the stage embeds words.
        side: see ``SideTensor``; None with ``x_BSD``.
    """

    virtual: int = 0
    x_BSD: Tensor | None = None
    side: Tensor | None = None


class StageOutput(NamedTuple):
    """Hold what the next stage computes from; a tuple of tensors, as hooks of torch's wrappers expect."""

    x_BSD: Tensor
    side: Tensor


class SideTensor:
    """Pack what the experts of layers say into one tensor: a row for each layer with experts, zeros until it has run.

    Counts are exact: a float32 holds whole numbers up to 16 million, more than a rank's micro-batch has assignments.

    Args:
        layers: numbers of the layers with experts.
        num_experts: E.
    """

    def __init__(self, *, layers: Sequence[int], num_experts: int) -> None:
        self._layers = list(layers)
        self._widths = [len(LOSSES), 12 * num_experts, len(MEASURES)]

    def shape(self) -> tuple[int, int]:
        """Shape of the tensor."""
        return len(self._layers), sum(self._widths)

    @staticmethod
    def dtype(hidden: torch.dtype) -> torch.dtype:
        """Choose its dtype for hidden values of one."""
        return torch.promote_types(hidden, torch.float32)

    def pack(self, auxes: Mapping[int, MoEAux], earlier: Tensor | None, x_BSD: Tensor) -> Tensor:
        """Put the rows of layers that have run beside those of earlier stages.

        Args:
            auxes: by the layer's number.
            earlier: of the stage before.
            x_BSD: tells dtype and device.
        """
        dtype = self.dtype(x_BSD.dtype)
        if earlier is None:
            earlier = torch.zeros(self.shape(), dtype=dtype, device=x_BSD.device)
        rows = []
        for layer, row in zip(self._layers, earlier.unbind(), strict=True):
            aux = auxes.get(layer)
            if aux is not None:
                parts = (aux.losses, aux.histogram_34E.reshape(-1), aux.measures_4)
                row = torch.cat([part.to(dtype) for part in parts])
            rows.append(row)
        return torch.stack(rows) if rows else earlier

    def unpack(self, side: Tensor) -> dict[int, MoEAux]:
        """Read the rows of all layers, by the layer's number."""
        found = {}
        for layer, row in zip(self._layers, side.unbind(), strict=True):
            losses, histogram, measures = row.split(self._widths)
            found[layer] = MoEAux(
                losses=losses,
                histogram_34E=histogram.detach().round().long().view(3, 4, -1),
                measures_4=measures.detach().float(),
            )
        return found
