"""Describe one routing decision in numbers: pure functions, names and units as in fairseq's moe branch."""

import math

import torch
from torch import Tensor

from fairseq_moe.modules.routing.contract import AssignmentCounts

__all__ = ["LAYER_STATS", "layer_stats", "load_violations"]

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

_SAMPLE_FRACTION = 0.2


def layer_stats(
    gates_TE: Tensor,
    counts: AssignmentCounts,
    *,
    top_k: int,
    all_to_all_cpu_time_ms: float = 0.0,
    all_to_all_cuda_time_ms: float = 0.0,
    bias_E: Tensor | None = None,
    padding_T: Tensor | None = None,
) -> Tensor:
    """Compute the statistics of one layer and one micro-batch, in the order of ``LAYER_STATS``.

    Histograms count raw choices, before the second-expert policy and capacity. With one expert per
    token all ``expert2`` values are 0, and so is ``overflow_expert1`` (the branch logs it so; ``drop_rate``
    tells the truth). Nothing to count gives 0, never NaN.

    Args:
        gates_TE: float gate probabilities.
        counts: of the same tokens' assignments.
        top_k: K.
        all_to_all_cpu_time_ms: measured by the caller.
        all_to_all_cuda_time_ms: measured by the caller.
        bias_E: the router's expert bias, if it has one.
        padding_T: bool, tokens that no number is about; None: all are counted.

    Returns:
        float32 (len(LAYER_STATS),).
    """
    num_experts = gates_TE.shape[-1]
    valid_T = gates_TE.new_ones(len(gates_TE), dtype=torch.bool) if padding_T is None else ~padding_T
    zero = torch.zeros((), device=gates_TE.device)
    by_fate_34 = counts.histogram_34E.sum(-1)
    dropped_3 = by_fate_34[:, 1]
    requested_3 = by_fate_34[:, 0] + dropped_3
    chosen_3E = counts.histogram_34E[:, :3].sum(1)
    share_3E = torch.sort(100.0 * chosen_3E / counts.num_tokens().clamp(min=1), descending=True).values
    values = {name: zero for name in LAYER_STATS}
    values["entropy_gating"] = _entropy(gates_TE, valid_T)
    values["drop_rate"] = _percent(dropped_3.sum(), requested_3.sum())
    values["all_to_all_cpu_time_ms"] = zero + all_to_all_cpu_time_ms
    values["all_to_all_cuda_time_ms"] = zero + all_to_all_cuda_time_ms
    if bias_E is not None:
        values["expert_bias_spread"] = bias_E.max() - bias_E.min()
    for choice in range(min(top_k, 2)):
        name = f"expert{choice + 1}"
        sample = max(math.ceil(num_experts * _SAMPLE_FRACTION), 1)
        values[f"unused_{name}_count"] = (chosen_3E[choice] == 0).sum()
        values[f"{name}_balance_top"] = share_3E[choice, :sample].sum()
        values[f"{name}_balance_bottom"] = share_3E[choice, -sample:].sum()
        if top_k > 1:
            values[f"overflow_{name}"] = _percent(dropped_3[choice], requested_3[choice])
    return torch.stack([values[name].float() for name in LAYER_STATS])


def _entropy(gates_TE: Tensor, valid_T: Tensor) -> Tensor:
    gates = gates_TE.float()
    eps = torch.finfo(gates.dtype).eps
    entropy_T = -(gates * gates.clamp(min=eps, max=1 - eps).log()).sum(-1)
    return (entropy_T * valid_T).sum() / valid_T.sum().clamp(min=1)


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
