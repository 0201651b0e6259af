"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe.modules.shards import Shards

__all__ = ["RMSNorm", "normalize_over_tensor"]


class RMSNorm(nn.Module):
    """Divides by the root of the mean square: weight * x / sqrt(mean(x^2) + eps), over the last axis.

    The quotient is taken in float32 (float64 stays so) and rounded before the product, as in the published models.

    Args:
        dim: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D), in the wider dtype of ``x`` and the weight."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if wide.dtype == x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(wide, self.weight.shape, None, self.eps).to(x.dtype)


def normalize_over_tensor(norms: list[RMSNorm], values: list[Tensor], shards: Shards) -> list[Tensor]:
    """Normalise values whose last axis is spread over tensor ranks: one sum of squares for all of them.

    Args:
        norms: each with the weights of this rank's part.
        values: float (..., this rank's part), one for each norm, of equal shapes but for the last axis.
        shards: the tensor ranks, each with a part of the same width.
    """
    if shards.tensor == 1:
        return [norm(value) for norm, value in zip(norms, values, strict=True)]
    wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
    sums = shards.sum_over_tensor(torch.stack([value.square().sum(-1) for value in wide], -1))
    found = []
    for norm, value, summed in zip(norms, wide, sums.unbind(-1), strict=True):
        mean = summed.unsqueeze(-1) / (value.shape[-1] * shards.tensor)
        found.append(norm.weight * (value * torch.rsqrt(mean + norm.eps)).to(values[0].dtype))
    return found
