"""Shared experts: one feed-forward network that every token passes (DeepSeekMoE, arXiv 2401.06066)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe.modules.kernels.swiglu import is_gated
from fairseq_moe.modules.recompute import recomputed

__all__ = ["SharedExperts"]


class SharedExperts(nn.Module):
    """dropout(W2 activation_dropout(act(W1 x + b1)) + b2), optionally times sigmoid(x . g) (Qwen2-MoE).

    Its parameters are dense: every rank holds all of them. With a gated activation the first matrix has 2F outputs
    and there are no biases unless they are asked for, as in ``Experts``.

    Args:
        model_dim: D.
        hidden_dim: total width of the shared experts.
        activation: elementwise function, or a gated one.
        gated_bias: such a network has biases, too.
        gated: scale each token's output by a learned sigmoid gate.
        activation_dropout: probability, after the activation.
        dropout: probability, on the output.
        recompute: compute the network again in the backward pass.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        hidden_dim: int,
        activation: Callable[[Tensor], Tensor],
        gated_bias: bool = False,
        gated: bool = False,
        activation_dropout: float = 0.0,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        has_gate = is_gated(activation)
        has_bias = gated_bias or not has_gate
        self.fc1 = nn.Linear(model_dim, 2 * hidden_dim if has_gate else hidden_dim, bias=has_bias)
        self.fc2 = nn.Linear(hidden_dim, model_dim, bias=has_bias)
        self.gate = nn.Linear(model_dim, 1, bias=False) if gated else None
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.dropout = dropout
        self.recompute = recompute

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        output: Tensor = recomputed(self._network, x_TD) if self.recompute else self._network(x_TD)
        return output

    def _network(self, x_TD: Tensor) -> Tensor:
        hidden = F.dropout(self.activation(self.fc1(x_TD)), self.activation_dropout, self.training)
        y_TD = F.dropout(self.fc2(hidden), self.dropout, self.training)
        return y_TD if self.gate is None else y_TD * torch.sigmoid(self.gate(x_TD))
