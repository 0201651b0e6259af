"""Join what the layers of a model say besides their outputs, over the ranks of a micro-batch, once per forward pass."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fairseq_moe.modules.moe_layer import MoEAux
from fairseq_moe.modules.routing.contract import LOSSES
from fairseq_moe.modules.routing.stats import MEASURES
from fairseq_moe.modules.shards import Shards

__all__ = ["whole_auxes"]

_JOINED = MEASURES.index("expert_bias_spread")  # measures before it: the entropy and the times


def whole_auxes(auxes: Sequence[MoEAux | None], shards: Shards) -> list[MoEAux | None]:
    """Make losses and measures of the whole micro-batch of this rank's, for all layers in one collective.

    The shares of a loss are added up, and each gets the gradient of the sum. Of measures, the entropy is added up,
    times are averaged, and the spread of the bias is the same on all ranks. Histograms are those of all ranks already.

    Args:
        auxes: of each layer, None for a dense one; the same layers on all ranks of the micro-batch.
        shards: joins those ranks.

    Returns:
        As many; what was given, where this rank has all tokens.
    """
    found = [aux for aux in auxes if aux is not None]
    num_ranks = shards.context * shards.tensor
    if num_ranks == 1 or not found:
        return list(auxes)
    losses = torch.stack([aux.losses for aux in found])
    measures = torch.stack([aux.measures_4 for aux in found])
    # Measures ride with the losses, whose dtype is never the narrower one.
    shares = torch.cat([losses, measures[:, :_JOINED].detach()], dim=1)
    summed_losses, summed = shards.total(shares).split([len(LOSSES), _JOINED], dim=1)
    entropy, times = summed.detach().to(measures.dtype).split([1, _JOINED - 1], dim=1)
    measures = torch.cat([entropy, times / num_ranks, measures[:, _JOINED:]], dim=1)
    wholes = iter(zip(found, summed_losses.unbind(), measures.unbind(), strict=True))
    joined: list[MoEAux | None] = []
    for aux in auxes:
        if aux is not None:
            own, losses_of_layer, measures_4 = next(wholes)
            aux = replace(own, losses=losses_of_layer, measures_4=measures_4)
        joined.append(aux)
    return joined
