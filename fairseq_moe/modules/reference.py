"""The slow, obvious mixture of experts that every fast path is compared with, in output and all gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.experts import Experts

__all__ = ["reference_moe"]


def reference_moe(
    x_TD: Tensor, router_weight_ED: Tensor, experts: Experts, *, capacity: int
) -> tuple[Tensor, Tensor]:
    """Top-2 routing (policy ``all``, normalised after dropping), token by token and expert by expert.

    Args:
        x_TD: float tokens.
        router_weight_ED: float.
        experts: all E experts.
        capacity: slots of an expert.

    Returns:
        (T, D) output and the scalar balance loss.
    """
    num_tokens, num_experts = x_TD.shape[0], router_weight_ED.shape[0]
    gates = torch.softmax(x_TD @ router_weight_ED.t(), dim=-1)
    order = gates.argsort(dim=-1, descending=True)
    queue = [0] * num_experts
    kept: list[list[int]] = [[] for _ in range(num_tokens)]
    for choice in range(2):
        for token in range(num_tokens):
            expert = int(order[token, choice])
            if queue[expert] < capacity:
                kept[token].append(expert)
            queue[expert] += 1
    outputs = []
    for token in range(num_tokens):
        total = sum((gates[token, expert] for expert in kept[token]), start=x_TD.new_zeros(()))
        out = x_TD[token] * 0
        for expert in kept[token]:
            biases = [None if b is None else b[expert] for b in (experts.fc1_bias, experts.fc2_bias)]
            hidden = F.linear(x_TD[token], experts.fc1_weight[expert], biases[0])
            y = F.linear(experts.activation(hidden), experts.fc2_weight[expert], biases[1])
            out = out + gates[token, expert] / total * y
        outputs.append(out)
    share = torch.stack([(order[:, 0] == e).to(gates.dtype).mean() for e in range(num_experts)])
    return torch.stack(outputs), num_experts * (gates.mean(0) * share).sum()
