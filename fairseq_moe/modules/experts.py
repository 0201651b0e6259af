"""Hold and apply the experts of one rank: L feed-forward networks with stacked weights, one tensor per matrix."""

import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.kernels.fp8 import Fp8Mode
from fairseq_moe.modules.kernels.swiglu import is_gated
from fairseq_moe.modules.kernels.table import Kernel, Stacks, choose_kernel, run_experts, under_autocast
from fairseq_moe.modules.parts import take_part
from fairseq_moe.modules.recompute import recomputed

__all__ = ["Experts"]

_THREADED_NUMEL = 1 << 24  # of fc1: a tenth of a second to draw


class Experts(nn.Module):
    """Apply L two-layer feed-forward networks: dropout(W2 activation_dropout(act(W1 x + b1)) + b2).

    The stacks are the only parameters: ``fc1_weight`` (L, F, D), ``fc1_bias`` (L, F), ``fc2_weight``
    (L, D, F), ``fc2_bias`` (L, D). Gated experts have 2F outputs in ``fc1_weight`` and ``fc1_bias``, those of the gate
    first, and biases where they are asked for.

    Args:
        num_local_experts: L.
        first_expert_id: global id of the first local expert.
        model_dim: D.
        hidden_dim: F.
        activation: elementwise function, not in place, without parameters; or a gated one (``kernels.swiglu``).
        activation_dropout: probability, after the activation.
        dropout: probability, on each expert's output.
        seed: expert e starts from the generator seeded with ``seed + e``, so that any spread of the experts
            over ranks starts from the same weights; no other generator is touched.
        recompute: compute the networks again in the backward pass.
        init_std: weights start normal with this deviation, biases at 0; None: as ``nn.Linear``.
        fp8: compute products in FP8 in this way, where it pays; None: not.
        marks: attributes of each parameter by its name, which it carries also after a copy or a conversion; whoever
            builds the layer says with them where these values lie on the ranks.
        gated_bias: gated experts have biases, too.
        part: (index, number) of the parts into which each expert's width F is divided; the stacks hold this one, and
            the output is a part of the sum that all give. The first part adds the second bias.
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
        fp8: Fp8Mode | None = None,
        marks: Mapping[str, Mapping[str, Any]] | None = None,
        gated_bias: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.part = part
        self.num_local_experts = num_local_experts
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.dropout = dropout
        self.recompute = recompute
        self.fp8 = fp8
        has_gate, width = is_gated(activation), hidden_dim // part[1]
        rows, has_bias = 2 * width if has_gate else width, gated_bias or not has_gate
        shapes = {
            "fc1_weight": (rows, model_dim),
            "fc1_bias": (rows,) if has_bias else None,
            "fc2_weight": (model_dim, width),
            "fc2_bias": (model_dim,) if has_bias else None,
        }
        for name, shape in shapes.items():
            stack = None if shape is None else nn.Parameter(torch.empty(num_local_experts, *shape))
            self.register_parameter(name, stack)
        self.marks = {name: dict(own) for name, own in (marks or {}).items()}
        self.mark_parameters()
        self.reset_parameters(seed=seed, first_expert_id=first_expert_id, std=init_std)

    def mark_parameters(self) -> None:
        """Set the attributes of ``marks`` on their parameters."""
        for name, parameter in self.named_parameters():
            for mark, value in self.marks.get(name, {}).items():
                setattr(parameter, mark, value)

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
        """Initialise as ``nn.Linear`` does, or normally, expert by expert, each from its own seed.

        Large stacks are drawn by a thread per core: seeds are the experts' own, so the numbers are the same.
        """
        if self.fc1_weight.is_meta:
            return

        def draw(local: int) -> None:
            generator = torch.Generator(self.fc1_weight.device).manual_seed(seed + first_expert_id + local)
            with torch.no_grad():  # which is a thread's own
                self._draw(local, generator, std)

        threads = 1 if self.fc1_weight.numel() < _THREADED_NUMEL else os.cpu_count() or 1
        with ThreadPoolExecutor(max_workers=min(threads, self.num_local_experts)) as pool:
            list(pool.map(draw, range(self.num_local_experts)))

    def _draw(self, local: int, generator: torch.Generator, std: float | None) -> None:
        for weight, bias, dim in ((self.fc1_weight, self.fc1_bias, 0), (self.fc2_weight, self.fc2_bias, 1)):
            # An expert is drawn whole, so that its numbers do not depend on the parts.
            shape = [*weight.shape[1:]]
            shape[dim] *= self.part[1]
            whole = weight[local] if self.part[1] == 1 else weight.new_empty(shape)
            if std is None:
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            else:
                nn.init.normal_(whole, std=std, generator=generator)
            blocks = 2 if dim == 0 and is_gated(self.activation) else 1
            self._keep_part(weight[local], whole, dim, blocks)
            if bias is not None:
                whole_bias = bias[local] if dim == 1 or self.part[1] == 1 else bias.new_empty(shape[0])
                bound = 0.0 if std is not None else 1 / math.sqrt(whole.shape[-1])
                nn.init.uniform_(whole_bias, -bound, bound, generator=generator)
                if dim == 0:
                    self._keep_part(bias[local], whole_bias, 0, blocks)

    def _keep_part(self, own: Tensor, whole: Tensor, dim: int, blocks: int) -> None:
        index, count = self.part
        if count > 1:
            own.copy_(take_part(whole, dim, index=index, count=count, blocks=blocks))

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
        fc2_bias = self.fc2_bias if self.part[0] == 0 else None
        stacks = Stacks(self.fc1_weight, self.fc1_bias, self.fc2_weight, fc2_bias)
        source_SD, stacks = under_autocast(source_SD, stacks)
        activation_dropout = self.activation_dropout if self.training else 0.0
        if kernel is None:
            kernel = choose_kernel(
                stacks,
                rows_per_expert=work.rows_per_expert,
                activation_dropout=activation_dropout,
                fp8=self.fp8,
            )
        return run_experts(
            kernel,
            source_SD,
            stacks,
            work,
            activation=self.activation,
            activation_dropout=activation_dropout,
            dropout=self.dropout if self.training else 0.0,
            fp8=self.fp8,
        )
