"""The experts one after the other, each from its rows to its outputs while they are in the cache.

Nothing of size R x F is touched twice from memory: of the hidden layer only the values before the activation
are kept for the backward pass, and the activation is computed again there. One exception:
where half precision has units of its own, GELU is dear beside the products, and its values are kept, too.

With a plan, nothing of size R x D is made either, but the mask of a dropout. An expert's rows are read from their
tokens when it is its turn, its outputs are added to them, and the gradient of a routing weight w, for y = w (W2 a + b2)
and the gradient g of y, is (g W2) . a + g . b2, whose first product is needed anyway: so outputs are not kept.
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
from fairseq_moe.modules.kernels.linear import Gradients, affine, mm_into

__all__ = ["sliced_network"]


class _How(NamedTuple):
    """What is not differentiated.

    Args:
        counts_L: rows of each expert.
        token_R: int64, the input's row that each row is; None: the input's rows in their order.
        activation: of the hidden layer; its values may be fewer (``swiglu``).
        dropout: probability, on the outputs; 0 outside training.
        wide: dtype of the products.
        needs_grad: a backward pass may follow.
        keeps_active: keep the values after the activation for it, too.
    """

    counts_L: Sequence[int]
    token_R: Tensor | None
    activation: Activation
    dropout: float
    wide: torch.dtype
    needs_grad: bool
    keeps_active: bool

    @property
    def dropout_scale(self) -> float:
        """What is not dropped is larger by this."""
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0

    def nothing(self) -> list[None]:
        """For each expert."""
        return [None] * len(self.counts_L)

    def split(self, values_R: Tensor | None) -> Sequence[Tensor | None]:
        """The part of each expert."""
        return self.nothing() if values_R is None else values_R.split(self.counts_L)

    def read(self, values_SD: Tensor) -> Iterable[Tensor]:
        """The rows of each expert, when it is its turn."""
        if self.token_R is None:
            return values_SD.split(self.counts_L)
        return (values_SD.index_select(0, token) for token in self.token_R.split(self.counts_L))


def sliced_network(
    source_SD: Tensor,
    stacks: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    work: ExpertWork,
    *,
    activation: Activation,
    dropout: float,
    wide: torch.dtype,
) -> Tensor:
    """dropout(W2 act(W1 x (+ b1)) (+ b2)) of each row's expert, where ``work`` says; products in ``wide``."""
    how = _How(
        counts_L=tuple(work.counts_L),
        token_R=None if work.plan is None else work.plan.token_R,
        activation=activation,
        dropout=dropout,
        wide=wide,
        needs_grad=torch.is_grad_enabled(),
        keeps_active=activation is F.gelu and wide.itemsize < 4,
    )
    weights_R = None if work.weights_R is None else work.weights_R.to(source_SD.dtype)
    return _SlicedNetwork.apply(source_SD, *stacks, weights_R, how)


class _SlicedNetwork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source_SD: Tensor, *args: Any) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, weights_R, how = args
        wide = how.wide
        out = _Places(source_SD, fc2_weight.shape[1], how)
        kept = _Kept.empty(source_SD, fc1_weight.shape[1], fc2_weight, how)
        for expert, (x, w1, b1, w2, b2, weight, keep) in enumerate(
            zip(
                how.read(source_SD),
                fc1_weight,
                _unbound(fc1_bias, how),
                fc2_weight,
                _unbound(fc2_bias, how),
                how.split(weights_R),
                kept.slices(how),
                strict=True,
            )
        ):
            hidden = affine(x.to(wide), w1.to(wide), b1, out=keep.hidden)
            active = how.activation(hidden)
            if keep.active is not None:
                keep.active.copy_(active)
            y = affine(active, w2.to(wide), b2)
            if how.dropout > 0:
                y, mask = torch.native_dropout(y, how.dropout, True)
                if keep.mask is not None:
                    keep.mask.copy_(mask)
            out.put(expert, y if weight is None else y * weight.unsqueeze(1))
        ctx.save_for_backward(source_SD, fc1_weight, fc2_weight, fc2_bias, weights_R, *kept)
        ctx.how = how
        return out.all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        source_SD, fc1_weight, fc2_weight, fc2_bias, weights_R, *kept = ctx.saved_tensors
        how: _How = ctx.how
        wide, wanted = how.wide, ctx.needs_input_grad
        grad_source = _Places(source_SD, source_SD.shape[1], how) if wanted[0] else None
        into = _Gradients.empty(wanted[1:], fc1_weight, fc2_weight, weights_R)
        with torch.autocast(source_SD.device.type, enabled=False):
            for expert, (x, grad, w1, w2, b2, weight, keep, to) in enumerate(
                zip(
                    how.read(source_SD),
                    how.read(grads[0].contiguous()),
                    fc1_weight,
                    fc2_weight,
                    _unbound(fc2_bias, how),
                    how.split(weights_R),
                    _Kept(*kept).slices(how),
                    into.slices(how),
                    strict=True,
                )
            ):
                assert keep.hidden is not None
                grad = grad.to(wide)
                if keep.mask is not None:
                    grad = torch.ops.aten.native_dropout_backward(grad, keep.mask, how.dropout_scale)
                grad_active = torch.mm(grad, w2.to(wide))
                active, grad_hidden = through_activation(
                    how.activation, keep.hidden.to(wide), keep.active, grad_active
                )
                if to.weights is not None:
                    grad_weight = torch.linalg.vecdot(grad_active, active)
                    to.weights.copy_(grad_weight if b2 is None else grad_weight.addmv_(grad, b2.to(wide)))
                if weight is not None:
                    grad = grad * weight.unsqueeze(1)
                    grad_hidden = grad_hidden.mul_(weight.unsqueeze(1))
                _linear_gradients(to.fc2_weight, to.fc2_bias, grad, active)
                _linear_gradients(to.fc1_weight, to.fc1_bias, grad_hidden, x.to(wide))
                if grad_source is not None:
                    grad_source.put(expert, torch.mm(grad_hidden, w1.to(wide)))
        return (None if grad_source is None else grad_source.all(), *into, None)


class _Places:
    """(S, D) of the input's dtype, made of the experts' parts: put in their places, or added to their tokens.

    Sums are taken in float32 at least. No expert has a token twice (but for a padded dispatch's filler, of weight 0),
    so sums are the same in every run.
    """

    def __init__(self, source_SD: Tensor, width: int, how: _How) -> None:
        self._dtype = source_SD.dtype
        shape = (len(source_SD), width)
        if how.token_R is None:
            self._values = cpu_memory.empty(shape, like=source_SD)
            self._parts = self._values.split(how.counts_L)
        else:
            dtype = torch.promote_types(self._dtype, torch.float32)
            self._values = cpu_memory.empty(shape, like=source_SD, dtype=dtype).zero_()
            self._parts = how.token_R.split(how.counts_L)
        self._adds = how.token_R is not None

    def put(self, expert: int, part: Tensor) -> None:
        """An expert's part."""
        if self._adds:
            self._values.index_add_(0, self._parts[expert], part.to(self._values.dtype))
        else:
            self._parts[expert].copy_(part)

    def all(self) -> Tensor:
        """When every expert has had its turn."""
        return self._values.to(self._dtype)


def _unbound(bias_LO: Tensor | None, how: _How) -> Sequence[Tensor | None]:
    return how.nothing() if bias_LO is None else bias_LO.unbind()


def _linear_gradients(weight: Tensor | None, bias: Tensor | None, grad: Tensor, x: Tensor) -> None:
    if weight is not None:
        mm_into(weight, grad.t(), x)
    if bias is not None:
        bias.copy_(grad.sum(0))


class _Kept(NamedTuple):
    """For the backward pass: hidden values before and after the activation, and the mask of the dropout.

    None where they are not needed.
    """

    hidden: Tensor | None
    active: Tensor | None
    mask: Tensor | None

    @classmethod
    def empty(cls, source_SD: Tensor, hidden_dim: int, fc2_weight: Tensor, how: _How) -> "_Kept":
        """Every slice will be written once."""
        if not how.needs_grad:
            return cls(None, None, None)
        num_rows, active_dim = sum(how.counts_L), fc2_weight.shape[2]
        like = source_SD
        return cls(
            cpu_memory.empty((num_rows, hidden_dim), like=like),
            cpu_memory.empty((num_rows, active_dim), like=like, dtype=how.wide) if how.keeps_active else None,
            like.new_empty((num_rows, fc2_weight.shape[1]), dtype=torch.bool) if how.dropout > 0 else None,
        )

    def slices(self, how: _How) -> "list[_Kept]":
        """The part of each expert."""
        return [_Kept(*parts) for parts in zip(*map(how.split, self), strict=True)]


class _Gradients(NamedTuple):
    """Of parameters and weights, in the order of the inputs; None where nobody asked."""

    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None
    weights: Tensor | None

    @classmethod
    def empty(
        cls, wanted: tuple[bool, ...], fc1_weight: Tensor, fc2_weight: Tensor, weights_R: Tensor | None
    ) -> "_Gradients":
        """Every slice will be written once."""
        return cls(
            cpu_memory.empty(fc1_weight.shape, like=fc1_weight) if wanted[0] else None,
            fc1_weight.new_empty(fc1_weight.shape[:2]) if wanted[1] else None,
            cpu_memory.empty(fc2_weight.shape, like=fc2_weight) if wanted[2] else None,
            fc2_weight.new_empty(fc2_weight.shape[:2]) if wanted[3] else None,
            torch.empty_like(weights_R) if weights_R is not None and wanted[4] else None,
        )

    def slices(self, how: _How) -> "list[_Gradients]":
        """The part of each expert."""
        stacks = (how.nothing() if stack is None else stack.unbind() for stack in self[:-1])
        return [_Gradients(*parts) for parts in zip(*stacks, how.split(self.weights), strict=True)]
