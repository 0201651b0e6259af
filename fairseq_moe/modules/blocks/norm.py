"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNorm"]


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
