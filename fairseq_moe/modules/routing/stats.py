"""Numbers that describe one routing decision: pure functions, names and units as in fairseq's moe branch."""

import math

import torch
from torch import Tensor

from fairseq_moe.modules.routing.contract import RoutingDecision, count_choices

__all__ = ["LAYER_STATS", "expert_load", "layer_stats", "load_violations"]

# Order of the entries of a layer's statistics vector, with their units:
LAYER_STATS = (
    "overflow_expert1",  # % of wanted first choices that found no place
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
    "drop_rate",  # % of all wanted assignments that found no place
    "expert_bias_spread",  # largest minus smallest expert bias
)

_SAMPLE_FRACTION = 0.2


def layer_stats(
    gates_TE: Tensor,
    decision: RoutingDecision,
    *,
    all_to_all_cpu_time_ms: float = 0.0,
    all_to_all_cuda_time_ms: float = 0.0,
    bias_E: Tensor | None = None,
    padding_T: Tensor | None = None,
) -> Tensor:
    """The statistics of one layer and one micro-batch, in the order of ``LAYER_STATS``.

    Histograms count raw choices, before the second-expert policy and capacity. With one expert per
    token all ``expert2`` values are 0, and so is ``overflow_expert1`` (the branch logs it so; ``drop_rate``
    tells the truth). Nothing to count gives 0, never NaN.

    Args:
        gates_TE: float gate probabilities.
        decision: a decision about the same tokens.
        all_to_all_cpu_time_ms: measured by the caller.
        all_to_all_cuda_time_ms: measured by the caller.
        bias_E: the router's expert bias, if it has one.
        padding_T: bool, tokens that no number is about; None: all are counted.

    Returns:
        float32 (len(LAYER_STATS),).
    """
    num_experts = gates_TE.shape[1]
    valid_T = torch.ones_like(decision.wanted_TK[:, 0]) if padding_T is None else ~padding_T
    num_tokens = valid_T.sum().clamp(min=1)
    top_k = decision.expert_ids_TK.shape[1]
    zero = torch.zeros((), device=gates_TE.device)
    dropped_TK = decision.wanted_TK & ~decision.kept_TK
    values = {name: zero for name in LAYER_STATS}
    values["entropy_gating"] = _entropy(gates_TE, valid_T)
    values["drop_rate"] = _percent(dropped_TK.sum(), decision.wanted_TK.sum())
    values["all_to_all_cpu_time_ms"] = zero + all_to_all_cpu_time_ms
    values["all_to_all_cuda_time_ms"] = zero + all_to_all_cuda_time_ms
    if bias_E is not None:
        values["expert_bias_spread"] = bias_E.max() - bias_E.min()
    for choice in range(min(top_k, 2)):
        name = f"expert{choice + 1}"
        counts_E = count_choices(decision.expert_ids_TK[:, choice], valid_T, num_experts=num_experts)
        share_E = torch.sort(100.0 * counts_E / num_tokens, descending=True).values
        sample = max(math.ceil(num_experts * _SAMPLE_FRACTION), 1)
        values[f"unused_{name}_count"] = (counts_E == 0).sum()
        values[f"{name}_balance_top"] = share_E[:sample].sum()
        values[f"{name}_balance_bottom"] = share_E[-sample:].sum()
        if top_k > 1:
            values[f"overflow_{name}"] = _percent(
                dropped_TK[:, choice].sum(), decision.wanted_TK[:, choice].sum()
            )
    return torch.stack([values[name].float() for name in LAYER_STATS])


def expert_load(decision: RoutingDecision, *, num_experts: int) -> Tensor:
    """Assignments per expert, wanted (row 0) and kept (row 1): float32 (2, E)."""
    rows = [
        count_choices(decision.expert_ids_TK, mask, num_experts=num_experts)
        for mask in (decision.wanted_TK, decision.kept_TK)
    ]
    return torch.stack(rows).float()


def _entropy(gates_TE: Tensor, valid_T: Tensor) -> Tensor:
    gates = gates_TE.float()
    eps = torch.finfo(gates.dtype).eps
    entropy_T = -(gates * gates.clamp(min=eps, max=1 - eps).log()).sum(-1)
    return (entropy_T * valid_T).sum() / valid_T.sum().clamp(min=1)


def _percent(part: Tensor, whole: Tensor) -> Tensor:
    return 100.0 * part / whole.clamp(min=1)


def load_violations(loads_LE: Tensor) -> Tensor:
    """How far the most and the least loaded expert are from the mean: max / mean - 1 and 1 - min / mean.

    Args:
        loads_LE: float (layers, E), assignments summed over ranks and micro-batches.

    Returns:
        float (layers, 2); 0 for a layer without assignments.
    """
    mean_L = loads_LE.mean(-1).clamp(min=1e-20)
    spread = torch.stack([loads_LE.amax(-1) / mean_L - 1, 1 - loads_LE.amin(-1) / mean_L], dim=-1)
    return spread * (loads_LE.sum(-1, keepdim=True) > 0)
