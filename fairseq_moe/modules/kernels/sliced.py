"""The kernel that takes expert after expert, each from its rows to its outputs while they are in the cache.

Nothing of size R x F is touched twice from memory: of the hidden layer only the values before the activation
are kept for the backward pass, and the activation is computed again there. One exception:
where half precision has units of its own, GELU is dear beside the products, and its values are kept, too.

With a plan, nothing of size R x D is made either, but the mask of a dropout. Each expert's rows are gathered from
the tokens just before its products, and its outputs are added to the tokens just after. The gradient of a routing
weight w, for y = w (W2 a + b2) and the gradient g of y, is (g W2) . a + g . b2, whose first product is needed
anyway: so outputs are not kept.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.kernels import cpu_memory
from fairseq_moe.modules.kernels.activation import Activation, through_activation
from fairseq_moe.modules.kernels.contract import Network, Stacks
from fairseq_moe.modules.kernels.matrix import Gradients, affine, mm_into

__all__ = ["sliced_network"]


class _Setup(NamedTuple):
    """Holds what both passes need and what has no gradient.

    Args:
        counts_L: rows of each expert.
        token_R: int64, the input's row that each row is; None: the input's rows in their order.
        activation: of the hidden layer; its values may be fewer (gated ones).
        dropout: probability, on the outputs; 0 outside training.
        wide: dtype of the products.
        needs_grad: a backward pass may follow.
        keeps_active: keep the values after the activation for it, too.
    """

    counts_L: tuple[int, ...]
    token_R: Tensor | None
    activation: Activation
    dropout: float
    wide: torch.dtype
    needs_grad: bool
    keeps_active: bool

    @property
    def dropout_scale(self) -> float:
        """Factor by which dropout enlarges what it keeps."""
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0

    def nones(self) -> list[None]:
        """List one None per expert, in the place of a tensor that is not there."""
        return [None] * len(self.counts_L)

    def unbind(self, stack: Tensor | None) -> Sequence[Tensor | None]:
        """List each expert's slice of a stack of parameters, or of their gradients."""
        return self.nones() if stack is None else stack.unbind()

    def split(self, values_R: Tensor | None) -> Sequence[Tensor | None]:
        """List each expert's part of values that exist per row."""
        return self.nones() if values_R is None else values_R.split(self.counts_L)

    def gather(self, values_SD: Tensor) -> Iterable[Tensor]:
        """Yield each expert's rows of the input; with a plan, no earlier than they are asked for."""
        if self.token_R is None:
            return values_SD.split(self.counts_L)
        return (values_SD.index_select(0, token) for token in self.token_R.split(self.counts_L))


def sliced_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts one after the other, with products in ``network.wide``.

    Raises:
        ValueError: values after the activation are to be dropped, which this kernel cannot do.
    """
    if network.activation_dropout > 0:
        raise ValueError(
            f"the kernel 'sliced' cannot drop values after the activation, but their dropout is "
            f"{network.activation_dropout}; choose_kernel takes 'loop' for it"
        )
    work = work.on_host()
    setup = _Setup(
        counts_L=work.host_counts(),
        token_R=None if work.plan is None else work.plan.token_R,
        activation=network.activation,
        dropout=network.dropout,
        wide=network.wide,
        needs_grad=torch.is_grad_enabled(),
        keeps_active=network.activation is F.gelu and network.wide.itemsize < 4,
    )
    weights_R = None if work.weights_R is None else work.weights_R.to(source_SD.dtype)
    return _SlicedNetwork.apply(source_SD, *stacks, weights_R, setup)


class _SlicedNetwork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source_SD: Tensor, *args: Any) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, weights_R, setup = args
        wide = setup.wide
        out = _Combined(source_SD, fc2_weight.shape[1], setup)
        kept = _Kept.empty(source_SD, fc1_weight.shape[1], fc2_weight, setup)
        for expert, (x, w1, b1, w2, b2, weight, keep) in enumerate(
            zip(
                setup.gather(source_SD),
                fc1_weight,
                setup.unbind(fc1_bias),
                fc2_weight,
                setup.unbind(fc2_bias),
                setup.split(weights_R),
                kept.slices(setup),
                strict=True,
            )
        ):
            # The product writes the hidden values to where they are kept: copying them would touch memory once more.
            hidden = affine(x.to(wide), w1.to(wide), b1, out=keep.hidden)
            active = setup.activation(hidden)
            if keep.active is not None:
                keep.active.copy_(active)
            y = affine(active, w2.to(wide), b2)
            if setup.dropout > 0:
                y, mask = torch.native_dropout(y, setup.dropout, True)
                if keep.mask is not None:
                    keep.mask.copy_(mask)
            out.add(expert, y if weight is None else y * weight.unsqueeze(1))
        ctx.save_for_backward(source_SD, fc1_weight, fc2_weight, fc2_bias, weights_R, *kept)
        ctx.setup = setup
        return out.result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        # Per expert, for y = w dropout(W2 a + b2), a = act(h), h = W1 x + b1, and the gradient g of y:
        #   g' = g back through the dropout         grad_w = (g' W2) . a + g' . b2
        #   grad_W2 = (w g')^T a                    grad_b2 = sum of w g'
        #   grad_h = w (g' W2) act'(h)              grad_W1 = grad_h^T x, grad_b1 = sum of grad_h
        #   grad_x = grad_h W1
        source_SD, fc1_weight, fc2_weight, fc2_bias, weights_R, *kept = ctx.saved_tensors
        setup: _Setup = ctx.setup
        wide, wanted = setup.wide, ctx.needs_input_grad
        grad_source = _Combined(source_SD, source_SD.shape[1], setup) if wanted[0] else None
        into = _Gradients.empty(wanted[1:], fc1_weight, fc2_weight, weights_R)
        with torch.autocast(source_SD.device.type, enabled=False):
            for expert, (x, grad, w1, w2, b2, weight, keep, to) in enumerate(
                zip(
                    setup.gather(source_SD),
                    # The gradient of adding outputs to their tokens is to read the tokens' gradient as rows.
                    setup.gather(grads[0].contiguous()),
                    fc1_weight,
                    fc2_weight,
                    setup.unbind(fc2_bias),
                    setup.split(weights_R),
                    _Kept(*kept).slices(setup),
                    into.slices(setup),
                    strict=True,
                )
            ):
                assert keep.hidden is not None
                grad = grad.to(wide)
                if keep.mask is not None:
                    grad = torch.ops.aten.native_dropout_backward(grad, keep.mask, setup.dropout_scale)
                grad_active = torch.mm(grad, w2.to(wide))
                active, grad_hidden = through_activation(
                    setup.activation, keep.hidden.to(wide), keep.active, grad_active
                )
                if to.weights is not None:  # needs the gradient before it is multiplied by the weight
                    grad_weight = torch.linalg.vecdot(grad_active, active)
                    to.weights.copy_(grad_weight if b2 is None else grad_weight.addmv_(grad, b2.to(wide)))
                if weight is not None:
                    grad = grad * weight.unsqueeze(1)
                    grad_hidden = grad_hidden.mul_(weight.unsqueeze(1))
                _linear_gradients(to.fc2_weight, to.fc2_bias, grad, active)
                _linear_gradients(to.fc1_weight, to.fc1_bias, grad_hidden, x.to(wide))
                if grad_source is not None:
                    grad_source.add(expert, torch.mm(grad_hidden, w1.to(wide)))
        return (None if grad_source is None else grad_source.result(), *into, None)


class _Combined:
    """Combines the experts' outputs to (S, D): added to their tokens, or without a plan left in the rows' order.

    Sums are taken in float32 at least. No expert has a token twice (but for a padded dispatch's filler, of weight 0),
    so sums are the same in every run.
    """

    def __init__(self, source_SD: Tensor, width: int, setup: _Setup) -> None:
        self._dtype = source_SD.dtype
        shape = (len(source_SD), width)
        if setup.token_R is None:
            self._values = cpu_memory.empty(shape, like=source_SD)
            self._parts = self._values.split(setup.counts_L)
        else:
            dtype = torch.promote_types(self._dtype, torch.float32)
            self._values = cpu_memory.empty(shape, like=source_SD, dtype=dtype).zero_()
            self._parts = setup.token_R.split(setup.counts_L)
        self._adds = setup.token_R is not None

    def add(self, expert: int, part: Tensor) -> None:
        """Take in the output of one expert's rows."""
        if self._adds:
            self._values.index_add_(0, self._parts[expert], part.to(self._values.dtype))
        else:
            self._parts[expert].copy_(part)

    def result(self) -> Tensor:
        """Give out the values, in the input's dtype, once every expert was added."""
        return self._values.to(self._dtype)


def _linear_gradients(weight: Tensor | None, bias: Tensor | None, grad: Tensor, x: Tensor) -> None:
    if weight is not None:
        mm_into(weight, grad.t(), x)
    if bias is not None:
        bias.copy_(grad.sum(0))


class _Kept(NamedTuple):
    """Keeps for the backward pass hidden values before and after the activation, and the mask of the dropout.

    None where they are not needed.
    """

    hidden: Tensor | None
    active: Tensor | None
    mask: Tensor | None

    @classmethod
    def empty(cls, source_SD: Tensor, hidden_dim: int, fc2_weight: Tensor, setup: _Setup) -> "_Kept":
        """Make room for all experts; every slice will be written once."""
        if not setup.needs_grad:
            return cls(None, None, None)
        num_rows, active_dim = sum(setup.counts_L), fc2_weight.shape[2]
        shape, wide, like = (num_rows, active_dim), setup.wide, source_SD
        return cls(
            cpu_memory.empty((num_rows, hidden_dim), like=like),
            cpu_memory.empty(shape, like=like, dtype=wide) if setup.keeps_active else None,
            like.new_empty((num_rows, fc2_weight.shape[1]), dtype=torch.bool) if setup.dropout > 0 else None,
        )

    def slices(self, setup: _Setup) -> "list[_Kept]":
        """List each expert's part."""
        return [_Kept(*parts) for parts in zip(*map(setup.split, self), strict=True)]


class _Gradients(NamedTuple):
    """Holds the gradients of parameters and routing weights, in the order of the inputs; None where nobody asked."""

    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None
    weights: Tensor | None

    @classmethod
    def empty(
        cls, wanted: tuple[bool, ...], fc1_weight: Tensor, fc2_weight: Tensor, weights_R: Tensor | None
    ) -> "_Gradients":
        """Make room for all experts; every slice will be written once."""
        return cls(
            cpu_memory.empty(fc1_weight.shape, like=fc1_weight) if wanted[0] else None,
            fc1_weight.new_empty(fc1_weight.shape[:2]) if wanted[1] else None,
            cpu_memory.empty(fc2_weight.shape, like=fc2_weight) if wanted[2] else None,
            fc2_weight.new_empty(fc2_weight.shape[:2]) if wanted[3] else None,
            torch.empty_like(weights_R) if weights_R is not None and wanted[4] else None,
        )

    def slices(self, setup: _Setup) -> "list[_Gradients]":
        """List each expert's part."""
        stacks = map(setup.unbind, self[:-1])
        return [_Gradients(*parts) for parts in zip(*stacks, setup.split(self.weights), strict=True)]
