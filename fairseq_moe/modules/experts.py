"""Hold and apply the experts of one rank: L feed-forward networks with stacked weights, one tensor per matrix."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.kernels.table import Kernel, Stacks, choose_kernel, run_experts, under_autocast
from fairseq_moe.modules.recompute import recomputed

__all__ = ["Experts"]


class Experts(nn.Module):
    """Apply L two-layer feed-forward networks: dropout(W2 activation_dropout(act(W1 x + b1)) + b2).

    The stacks are the only parameters: ``fc1_weight`` (L, F, D), ``fc1_bias`` (L, F), ``fc2_weight``
    (L, D, F), ``fc2_bias`` (L, D). Gated experts (``activation`` is ``swiglu``) have 2F outputs in ``fc1_weight``,
    those of the gate first, and no biases.

    Args:
        num_local_experts: L.
        first_expert_id: global id of the first local expert.
        model_dim: D.
        hidden_dim: F.
        activation: elementwise function, not in place, without parameters; or ``swiglu``.
        activation_dropout: probability, after the activation.
        dropout: probability, on each expert's output.
        seed: expert e starts from the generator seeded with ``seed + e``, so that any spread of the experts
            over ranks starts from the same weights; no other generator is touched.
        recompute: compute the networks again in the backward pass.
        init_std: weights start normal with this deviation, biases at 0; None: as ``nn.Linear``.
        marks: attributes that every parameter carries, also after a copy or a conversion; whoever builds the
            layer says with them that these values are those of this rank alone.
    """

    fc1_weight: nn.Parameter
    fc1_bias: nn.Parameter | None
    fc2_weight: nn.Parameter
    fc2_bias: nn.Parameter | None

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
        recompute: bool = False,
        init_std: float | None = None,
        marks: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.dropout = dropout
        self.recompute = recompute
        is_glu = activation is swiglu
        shapes = {
            "fc1_weight": (2 * hidden_dim if is_glu else hidden_dim, model_dim),
            "fc1_bias": None if is_glu else (hidden_dim,),
            "fc2_weight": (model_dim, hidden_dim),
            "fc2_bias": None if is_glu else (model_dim,),
        }
        for name, shape in shapes.items():
            stack = None if shape is None else nn.Parameter(torch.empty(num_local_experts, *shape))
            self.register_parameter(name, stack)
        self.marks = dict(marks or {})
        self.mark_parameters()
        self.reset_parameters(seed=seed, first_expert_id=first_expert_id, std=init_std)

    def mark_parameters(self) -> None:
        """Set the attributes of ``marks`` on every parameter."""
        for parameter in self.parameters():
            for name, value in self.marks.items():
                setattr(parameter, name, value)

    # torch makes new Parameters, without our marks, in the three operations below.

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Mark the parameters of a copied or unpickled module."""
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
    def reset_parameters(self, *, seed: int, first_expert_id: int, std: float | None = None) -> None:
        """Initialise as ``nn.Linear`` does, or normally, expert by expert, each from its own seed."""
        if self.fc1_weight.is_meta:
            return
        for local in range(self.num_local_experts):
            generator = torch.Generator(self.fc1_weight.device).manual_seed(seed + first_expert_id + local)
            for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
                if std is None:
                    nn.init.kaiming_uniform_(weight[local], a=math.sqrt(5), generator=generator)
                else:
                    nn.init.normal_(weight[local], std=std, generator=generator)
                if bias is not None:
                    bound = 0.0 if std is not None else 1 / math.sqrt(weight.shape[-1])
                    nn.init.uniform_(bias[local], -bound, bound, generator=generator)

    def forward(self, source_SD: Tensor, work: ExpertWork, *, kernel: Kernel | None = None) -> Tensor:
        """Apply expert l to its rows, and add the results up where ``work`` says.

        Args:
            source_SD: float, rows sorted by local expert, or what ``work.plan`` takes rows from.
            work: how many rows each expert has, where results go, and with what weight. Experts without rows get
                zero (not missing) gradients.
            kernel: overrides the choice of ``kernels.table``.

        Returns:
            (S, D).
        """
        run = functools.partial(self._run, work=work, kernel=kernel)
        output: Tensor = recomputed(run, source_SD) if self.recompute else run(source_SD)
        return output

    def _run(self, source_SD: Tensor, *, work: ExpertWork, kernel: Kernel | None) -> Tensor:
        stacks = Stacks(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        source_SD, stacks = under_autocast(source_SD, stacks)
        activation_dropout = self.activation_dropout if self.training else 0.0
        if kernel is None:
            kernel = choose_kernel(
                stacks, rows_per_expert=work.rows_per_expert, activation_dropout=activation_dropout
            )
        return run_experts(
            kernel,
            source_SD,
            stacks,
            work,
            activation=self.activation,
            activation_dropout=activation_dropout,
            dropout=self.dropout if self.training else 0.0,
        )
