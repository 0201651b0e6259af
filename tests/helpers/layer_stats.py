"""Statistics of one layer by itself, from what it hands out, and what it hands out of given loads."""

import torch
from torch import Tensor

from fairseq_moe.modules import MoEAux
from fairseq_moe.modules.routing import stats

__all__ = ["histogram_of", "load_of", "named_stats_of", "stats_of"]


def stats_of(aux: MoEAux) -> Tensor:
    """Compute the statistics of the layer that these are of, in the order of ``LAYER_STATS``."""
    return stats.layer_stats(aux.histogram_34E.unsqueeze(0), aux.measures_4.unsqueeze(0))[0]


def load_of(aux: MoEAux) -> Tensor:
    """Count the requested and the kept assignments of each expert of the layer: float32 (2, E)."""
    return stats.layer_loads(aux.histogram_34E.unsqueeze(0))[0]


def named_stats_of(aux: MoEAux) -> dict[str, float]:
    """Compute the same, by name."""
    return dict(zip(stats.LAYER_STATS, stats_of(aux).tolist(), strict=True))


def histogram_of(load_2E: list[list[int]]) -> Tensor:
    """Make a histogram of first choices that has these requested and kept assignments."""
    requested, kept = torch.tensor(load_2E)
    histogram_34E = torch.zeros(3, 4, len(kept), dtype=torch.int64)
    histogram_34E[0, :2] = torch.stack([kept, requested - kept])
    return histogram_34E
