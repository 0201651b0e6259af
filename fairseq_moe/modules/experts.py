"""The experts of one rank: L feed-forward networks whose weights are stacked, one tensor per matrix."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Experts"]


class Experts(nn.Module):
    """L two-layer feed-forward networks: dropout(W2 activation_dropout(act(W1 x + b1)) + b2).

    The stacks are the only parameters: ``fc1_weight`` (L, F, D), ``fc1_bias`` (L, F), ``fc2_weight``
    (L, D, F), ``fc2_bias`` (L, D). Each carries the attribute ``expert``, which tells data-parallel wrappers
    and the gradient norm that its values belong to this rank.

    Args:
        num_local_experts: L.
        first_expert_id: global id of the first local expert.
        model_dim: D.
        hidden_dim: F.
        activation: elementwise function.
        activation_dropout: probability, after the activation.
        dropout: probability, on each expert's output.
        seed: expert e starts from the generator seeded with ``seed + e``, so that any spread of the experts
            over ranks starts from the same weights; no other generator is touched.
    """

    fc1_weight: nn.Parameter
    fc1_bias: nn.Parameter
    fc2_weight: nn.Parameter
    fc2_bias: nn.Parameter

    def __init__(
        self,
        *,
        num_local_experts: int,
        first_expert_id: int,
        model_dim: int,
        hidden_dim: int,
        activation: Callable[[Tensor], Tensor],
        activation_dropout: float = 0.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.dropout = dropout
        shapes = {
            "fc1_weight": (hidden_dim, model_dim),
            "fc1_bias": (hidden_dim,),
            "fc2_weight": (model_dim, hidden_dim),
            "fc2_bias": (model_dim,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_local_experts, *shape)))
        self.mark_parameters()
        self.reset_parameters(seed=seed, first_expert_id=first_expert_id)

    def mark_parameters(self) -> None:
        """Set ``expert = True`` on every parameter."""
        for parameter in self.parameters():
            parameter.expert = True  # type: ignore[attr-defined]

    # torch makes new Parameters, without our mark, in the three operations below.

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copying and unpickling."""
        super().__setstate__(state)
        self.mark_parameters()

    def _apply(self, *args: Any, **kwargs: Any) -> "Experts":
        super()._apply(*args, **kwargs)
        self.mark_parameters()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.mark_parameters()

    @torch.no_grad()
    def reset_parameters(self, *, seed: int, first_expert_id: int) -> None:
        """Initialise as ``nn.Linear`` does, expert by expert, each from its own seed."""
        if self.fc1_weight.is_meta:
            return
        for local in range(self.num_local_experts):
            generator = torch.Generator(self.fc1_weight.device).manual_seed(seed + first_expert_id + local)
            for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
                nn.init.kaiming_uniform_(weight[local], a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(weight.shape[-1])
                nn.init.uniform_(bias[local], -bound, bound, generator=generator)

    def forward(self, rows_RD: Tensor, counts_L: Sequence[int]) -> Tensor:
        """Apply expert l to its rows.

        Args:
            rows_RD: float, rows sorted by local expert.
            counts_L: rows of each local expert; zeros are fine and give zero (not missing) gradients.

        Returns:
            (R, D).
        """
        hidden_RF = self.activation(
            _GroupedLinear.apply(rows_RD, self.fc1_weight, self.fc1_bias, tuple(counts_L))
        )
        hidden_RF = F.dropout(hidden_RF, self.activation_dropout, self.training)
        out_RD = _GroupedLinear.apply(hidden_RF, self.fc2_weight, self.fc2_bias, tuple(counts_L))
        return F.dropout(out_RD, self.dropout, self.training)


class _GroupedLinear(torch.autograd.Function):
    """y[group l] = x[group l] W[l]^T + b[l]; weight gradients are written straight into the stack."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor, counts_L: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_LOI)
        ctx.counts_L = counts_L
        y_RO = x_RI.new_empty((x_RI.shape[0], weight_LOI.shape[1]))
        for expert, (x, y) in enumerate(zip(x_RI.split(counts_L), y_RO.split(counts_L), strict=True)):
            torch.addmm(bias_LO[expert], x, weight_LOI[expert].t(), out=y)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_RI, weight_LOI = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x_RI = torch.empty_like(x_RI) if wants_x else None
        grad_weight_LOI = torch.empty_like(weight_LOI) if wants_weight else None
        grad_bias_LO = weight_LOI.new_empty(weight_LOI.shape[:2]) if wants_bias else None
        start = 0
        for expert, count in enumerate(ctx.counts_L):
            rows = slice(start, start + count)
            start += count
            if grad_weight_LOI is not None:
                torch.mm(grad_RO[rows].t(), x_RI[rows], out=grad_weight_LOI[expert])
            if grad_bias_LO is not None:
                torch.sum(grad_RO[rows], dim=0, out=grad_bias_LO[expert])
            if grad_x_RI is not None:
                torch.mm(grad_RO[rows], weight_LOI[expert], out=grad_x_RI[rows])
        return grad_x_RI, grad_weight_LOI, grad_bias_LO, None
