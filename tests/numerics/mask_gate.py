"""An independent, slow gate made of one-hot masks, written from the published formulas.

The routing under test sorts indices; this one never does: positions are running sums of masks, and the
result is the dense (tokens, experts, capacity) tensor of combine weights. Letters: S tokens, E experts, C
capacity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GateCase", "MaskGate", "mask_gate"]


@dataclass(frozen=True, kw_only=True)
class GateCase:
    """One choice of all flags that touch the gate."""

    top_k: int = 2
    policy: str = "all"
    normalize_before: bool = False
    prioritized: bool = False
    use_fp32: bool = False
    training: bool = True
    eval_fraction: float = 0.25


@dataclass(frozen=True, kw_only=True)
class MaskGate:
    """What the gate computed."""

    combine_SEC: Tensor
    l_aux: Tensor
    stats: dict[str, float]
    wanted_SE: Tensor


def mask_gate(
    logits_SE: Tensor, case: GateCase, *, padding_S: Tensor | None, noise_SE: Tensor, draw_S: Tensor
) -> MaskGate:
    """Gate the tokens; ``noise_SE`` is the Gumbel noise and ``draw_S`` the uniform draws of the policies."""
    num_tokens, num_experts = logits_SE.shape
    logits = logits_SE.float() if case.use_fp32 and logits_SE.dtype != torch.float64 else logits_SE
    gates = torch.softmax(logits, dim=1)
    mask1 = _one_hot(gates.argmax(1), num_experts)
    capacity = _capacity(num_tokens, num_experts, case)
    eps = torch.finfo(gates.dtype).eps
    stats = {"entropy_gating": _entropy(gates), **_histogram(mask1, 1)}
    masks = [mask1]
    if case.top_k == 2:
        scores = logits + noise_SE if case.policy == "sampling" and case.training else logits
        if num_experts > 1:
            scores = scores.masked_fill(mask1.bool(), float("-inf"))
        mask2 = _one_hot(scores.argmax(1), num_experts)
        stats |= _histogram(mask2, 2)
        g1, g2 = (gates * mask1).sum(1), (gates * mask2).sum(1)
        if case.normalize_before:
            denominator = (g1 + g2).clamp(min=eps)
            g1, g2 = g1 / denominator, g2 / denominator
        if case.policy == "random":
            keeps = 2 * g2 > draw_S if case.training else 2 * g2 >= 0.5
            mask2 = mask2 * keeps.long().unsqueeze(1)
        masks.append(mask2)
    if padding_S is not None:
        masks = [mask * (~padding_S).long().unsqueeze(1) for mask in masks]
    l_aux = _l_aux(gates, masks[0])
    wanted = [mask.clone() for mask in masks]
    places = _places(masks, gates if case.prioritized and case.top_k == 2 else None)
    kept = [mask * (place < capacity).long() for mask, place in zip(masks, places, strict=True)]
    if case.top_k == 2:
        for choice in range(2):
            asked, got = int(wanted[choice].sum()), int(kept[choice].sum())
            stats[f"overflow_expert{choice + 1}"] = 100 * (asked - got) / max(asked, 1)
    asked, got = sum(int(mask.sum()) for mask in wanted), sum(int(mask.sum()) for mask in kept)
    stats["drop_rate"] = 100 * (asked - got) / max(asked, 1)

    if case.top_k == 1:
        weights = [(gates * kept[0]).sum(1)]
    elif case.normalize_before:
        weights = [g1 * kept[0].sum(1), g2 * kept[1].sum(1)]
    else:
        g1, g2 = (gates * kept[0]).sum(1), (gates * kept[1]).sum(1)
        denominator = (g1 + g2).clamp(min=eps)
        weights = [g1 / denominator, g2 / denominator]
    combine = torch.zeros(num_tokens, num_experts, max(capacity, 1), dtype=gates.dtype)
    for weight, mask, place in zip(weights, kept, places, strict=True):
        place_S = (place * mask).sum(1)
        slots = _one_hot(place_S, max(capacity, 1)) * mask.sum(1, keepdim=True)
        combine = combine + weight[:, None, None] * mask[:, :, None] * slots[:, None, :]
    return MaskGate(
        combine_SEC=combine.to(logits_SE.dtype),
        l_aux=l_aux,
        stats=stats,
        wanted_SE=torch.stack(wanted).sum(0),
    )


def _one_hot(ids: Tensor, size: int) -> Tensor:
    return (ids.unsqueeze(1) == torch.arange(size)).long()


def _capacity(num_tokens: int, num_experts: int, case: GateCase) -> int:
    if not case.training and case.eval_fraction > 0:
        return math.ceil(case.eval_fraction * num_tokens)
    return case.top_k * math.ceil(num_tokens / num_experts)


def _places(masks: list[Tensor], gates_for_priority: Tensor | None) -> list[Tensor]:
    order = torch.arange(len(masks[0]))
    if gates_for_priority is not None:
        surest = gates_for_priority.detach().amax(1).tolist()
        order = torch.tensor(sorted(range(len(surest)), key=lambda s: (-surest[s], s)), dtype=torch.int64)
    places, ahead = [], torch.zeros(masks[0].shape[1], dtype=torch.int64)
    for mask in masks:
        place = torch.empty_like(mask)
        place[order] = torch.cumsum(mask[order], 0) - 1 + ahead
        places.append(place)
        ahead = ahead + mask.sum(0)
    return places


def _l_aux(gates: Tensor, mask1: Tensor) -> Tensor:
    wide = gates.float() if gates.dtype in (torch.float16, torch.bfloat16) else gates
    num_experts = gates.shape[1]
    return num_experts**2 * (wide.mean(0) * mask1.to(wide.dtype).mean(0)).mean()


def _entropy(gates: Tensor) -> float:
    g = gates.detach().double()
    eps = torch.finfo(torch.float32).eps
    return float(-(g * g.clamp(eps, 1 - eps).log()).sum(1).mean())


def _histogram(mask: Tensor, choice: int) -> dict[str, float]:
    counts = sorted((100 * mask.sum(0) / len(mask)).tolist())
    k = max(math.ceil(0.2 * len(counts)), 1)
    return {
        f"unused_expert{choice}_count": sum(count == 0 for count in counts),
        f"expert{choice}_balance_top": sum(counts[-k:]),
        f"expert{choice}_balance_bottom": sum(counts[:k]),
    }
