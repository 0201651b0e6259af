"""Describe routing decisions in numbers: pure functions, names and units as in fairseq's moe branch.

A layer hands out what is cheap, the histogram of its decision and a few measures; statistics, which sort, are taken
once for all layers together.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "LAYER_STATS",
    "MEASURES",
    "gate_entropy",
    "layer_loads",
    "layer_measures",
    "layer_stats",
    "load_violations",
]

# Order of the entries of a layer's statistics vector, with their units:
LAYER_STATS = (
    "overflow_expert1",  # % of requested first choices that found no slot
    "overflow_expert2",  # the same for second choices
    "entropy_gating",  # nats, mean over tokens
    "unused_expert1_count",  # experts that are nobody's first choice
    "unused_expert2_count",
    "expert1_balance_top",  # % of tokens whose first choice is among the 20 % most chosen experts
    "expert1_balance_bottom",  # the same for the 20 % least chosen
    "expert2_balance_top",
    "expert2_balance_bottom",
    "all_to_all_cpu_time_ms",  # this forward pass's two exchanges, host wall time
    "all_to_all_cuda_time_ms",  # the same between CUDA events
    "drop_rate",  # % of all requested assignments that found no slot
    "expert_bias_spread",  # largest minus smallest expert bias
)

# What a layer measures of one pass, besides the histogram of its decision, so that statistics can follow from them:
MEASURES = (
    "entropy_sum",  # nats, over the tokens that are not left out
    "all_to_all_cpu_time_ms",
    "all_to_all_cuda_time_ms",
    "expert_bias_spread",
)

_SAMPLE_FRACTION = 0.2


@torch.no_grad()
def layer_measures(
    entropy_T: Tensor,
    *,
    all_to_all_cpu_time_ms: float = 0.0,
    all_to_all_cuda_time_ms: float = 0.0,
    bias_E: Tensor | None = None,
) -> Tensor:
    """Gather a layer's measures of one micro-batch, in the order of ``MEASURES``.

    Args:
        entropy_T: float32, of each token's gates, 0 for those left out of statistics; see ``gate_entropy``.
        all_to_all_cpu_time_ms: measured by the caller.
        all_to_all_cuda_time_ms: measured by the caller.
        bias_E: the router's expert bias, if it has one.

    Returns:
        float32 (len(MEASURES),).
    """
    zero = entropy_T.new_zeros(())
    # Numbers of the host are added, for a tensor of them would have to be copied to the device.
    times = [zero + ms if ms else zero for ms in (all_to_all_cpu_time_ms, all_to_all_cuda_time_ms)]
    spread = zero
    if bias_E is not None:
        smallest, largest = torch.aminmax(bias_E)
        spread = (largest - smallest).float()
    return torch.stack([entropy_T.sum(), *times, spread])


@torch.no_grad()
def gate_entropy(gates_TE: Tensor, *, left_out_T: Tensor | None = None) -> Tensor:
    """Compute the entropy of each token's gates in nats, 0 for tokens that are left out: float32 (T,)."""
    gates_TE = gates_TE.float()
    eps = torch.finfo(gates_TE.dtype).eps
    entropy_T = -(gates_TE * gates_TE.clamp(min=eps, max=1 - eps).log()).sum(-1)
    return entropy_T if left_out_T is None else entropy_T * ~left_out_T


@torch.no_grad()
def layer_stats(histogram_L34E: Tensor, measures_L4: Tensor) -> Tensor:
    """Compute the statistics of layers, all in one go, for one micro-batch.

    Histograms count raw choices, before the second-expert policy and capacity. With one expert per
    token all ``expert2`` values are 0, and so is ``overflow_expert1`` (the branch logs it so; ``drop_rate``
    tells the truth). Nothing to count gives 0, never NaN.

    Args:
        histogram_L34E: int64, of each layer's assignments; see ``AssignmentCounts``.
        measures_L4: float32, of each layer; see ``layer_measures``.

    Returns:
        float32 (L, len(LAYER_STATS)), in the order of ``LAYER_STATS``.
    """
    num_experts = histogram_L34E.shape[-1]
    by_fate_L34 = histogram_L34E.sum(-1)
    num_tokens_L1 = by_fate_L34[:, :1, :3].sum(-1).clamp(min=1)
    has_second_L1 = by_fate_L34[:, 1:2].sum(-1) > 0
    dropped_L3 = by_fate_L34[..., 1]
    requested_L3 = by_fate_L34[..., 0] + dropped_L3
    overflow_L2 = _percent(dropped_L3[:, :2], requested_L3[:, :2]) * has_second_L1
    chosen_L2E = histogram_L34E[:, :2, :3].sum(2)
    share_L2E = torch.sort(100.0 * chosen_L2E / num_tokens_L1.unsqueeze(-1), descending=True).values
    sample = max(math.ceil(num_experts * _SAMPLE_FRACTION), 1)
    unused_L2 = (chosen_L2E == 0).sum(-1)
    entropy_sum, *times_and_spread = measures_L4.unbind(1)
    values = {
        "entropy_gating": entropy_sum / num_tokens_L1[:, 0],
        "drop_rate": _percent(dropped_L3.sum(-1), requested_L3.sum(-1)),
        **dict(zip(MEASURES[1:], times_and_spread, strict=True)),
    }
    by_choice = {
        "overflow_{}": overflow_L2,
        "unused_{}_count": torch.cat([unused_L2[:, :1], unused_L2[:, 1:] * has_second_L1], 1),
        "{}_balance_top": share_L2E[..., :sample].sum(-1),
        "{}_balance_bottom": share_L2E[..., -sample:].sum(-1),
    }
    for name, value_L2 in by_choice.items():
        for choice, value_L in enumerate(value_L2.unbind(1)):
            values[name.format(f"expert{choice + 1}")] = value_L
    return torch.stack([values[name].float() for name in LAYER_STATS], 1)


def layer_loads(histogram_L34E: Tensor) -> Tensor:
    """Count the requested and the kept assignments of each expert of layers: float32 (L, 2, E)."""
    kept_LE, dropped_LE, *_ = histogram_L34E.sum(1).unbind(1)
    return torch.stack([kept_LE + dropped_LE, kept_LE], 1).float()


def _percent(part: Tensor, whole: Tensor) -> Tensor:
    return 100.0 * part / whole.clamp(min=1)


def load_violations(loads_LE: Tensor) -> Tensor:
    """Measure how far the most and the least loaded expert are from the mean: max / mean - 1 and 1 - min / mean.

    Args:
        loads_LE: float (layers, E), assignments summed over ranks and micro-batches.

    Returns:
        float (layers, 2); 0 for a layer without assignments.
    """
    mean_L = loads_LE.mean(-1).clamp(min=1e-20)
    spread = torch.stack([loads_LE.amax(-1) / mean_L - 1, 1 - loads_LE.amin(-1) / mean_L], dim=-1)
    return spread * (loads_LE.sum(-1, keepdim=True) > 0)
