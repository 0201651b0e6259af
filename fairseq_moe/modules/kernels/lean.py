"""Compute the experts' networks in one autograd function that keeps the values before the activation and no others.

For y = w dropout(W2 a + b2), a = act_dropout(act(h + b1)), h = W1 x, and the gradient g of y, with g' = g back through
the dropout and v = w a:

    y = dropout(W2 v + w b2), so that outputs are not kept for the gradient of the routing weight w
    grad_w = (g' W2) . a + g' . b2
    grad_W2 = g'^T v        grad_b2 = sum of w g'
    grad_h = w (g' W2) act'(h + b1)
    grad_W1 = grad_h^T x    grad_b1 = sum of grad_h    grad_x = grad_h W1

Rows are taken from the tokens again, and activations computed again, in the backward pass. What is kept is the input
and h: 2 D S + 2 H R bytes in half precision, a few numbers per row, masks of dropouts. Sums over an expert's rows
are products with one column, so that rows which are nobody's reach none, and each is the same in every run.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.fused.add_bias import add_bias_
from fairseq_moe.fused.weighted_activation import zero_behind
from fairseq_moe.modules.dispatch.rows import ExpertWork, RowPlan, add_by_token
from fairseq_moe.modules.kernels.activation import Activation, activate, activate_backward
from fairseq_moe.modules.kernels.contract import Network, Stacks, device_counts
from fairseq_moe.modules.kernels.matrix import Gradients
from fairseq_moe.modules.kernels.products import Products

__all__ = ["lean_network"]

_COLUMN = 16  # values of a row of one number: the products want rows of a multiple of 16 bytes


class _Setup(NamedTuple):
    """Hold what both passes need and what has no gradient.

    Args:
        products: multiplies rows with matrices.
        sums: the same in the rows' own precision, for sums over rows and their products with biases.
        plan: which row of the input each row is; None: the input's rows in their order.
        expert_R: int64, the expert of each row; None for experts without biases.
        num_rows: int64 scalar on the device, rows that there are; None: all.
        activation: of the hidden layer.
        activation_dropout: probability, on its values; 0 outside training.
        dropout: probability, on the outputs; 0 outside training.
    """

    products: Products
    sums: Products
    plan: RowPlan | None
    expert_R: Tensor | None
    num_rows: Tensor | None
    activation: Activation
    activation_dropout: float
    dropout: float

    def take(self, source_SD: Tensor) -> Tensor:
        """Take the rows of the input, or of the gradient of the output."""
        return source_SD if self.plan is None else source_SD.index_select(0, self.plan.token_R)

    def put(self, rows_RD: Tensor) -> Tensor:
        """Add rows up where they were taken from."""
        return rows_RD if self.plan is None else add_by_token(rows_RD, self.plan)


def lean_network(
    products: Products,
    source_SD: Tensor,
    stacks: Stacks,
    work: ExpertWork,
    network: Network,
    *,
    sums: Products | None = None,
) -> Tensor:
    """Compute the experts with these products; see ``contract.KernelFunction``.

    ``sums`` are the products for what is summed up beside them, where ``products`` round more than the rows do.
    """
    num_rows = len(source_SD) if work.plan is None else len(work.plan.token_R)
    expert_R = None
    ends_L = device_counts(work, source_SD.device).cumsum(0)
    if stacks.fc1_bias is not None:
        rows_R = torch.arange(num_rows, device=source_SD.device)
        # Rows that are nobody's get the last expert's number, and no use is made of it.
        expert_R = torch.searchsorted(ends_L[:-1], rows_R, right=True)
    setup = _Setup(
        products=products,
        sums=products if sums is None else sums,
        plan=work.plan,
        expert_R=expert_R,
        num_rows=None if work.is_sized else ends_L[-1],
        activation=network.activation,
        activation_dropout=network.activation_dropout,
        dropout=network.dropout,
    )
    weights_R = None if work.weights_R is None else work.weights_R.to(source_SD.dtype)
    return _LeanNetwork.apply(source_SD, *stacks, weights_R, setup)


class _LeanNetwork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source_SD: Tensor, *args: Any) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, weights_R, setup = args
        hidden_RH = setup.products.outputs(setup.take(source_SD), fc1_weight)
        active_RF = activate(setup.activation, hidden_RH, fc1_bias, setup.expert_R, weights_R, setup.num_rows)
        active_RF, active_mask_RF = _dropped(active_RF, setup.activation_dropout)
        y_RD = setup.products.outputs(active_RF, fc2_weight)
        if fc2_bias is not None:
            y_RD = add_bias_(y_RD, fc2_bias, setup.expert_R, weights_R=weights_R, num_rows=setup.num_rows)
        y_RD, mask_RD = _dropped(y_RD, setup.dropout)
        ctx.save_for_backward(
            source_SD,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            weights_R,
            hidden_RH,
            active_mask_RF,
            mask_RD,
        )
        ctx.setup = setup
        return setup.put(y_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _backward(ctx, grads[0].contiguous())


def _backward(ctx: Any, grad_SD: Tensor) -> Gradients:
    source_SD, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weights_R, hidden_RH, *masks = ctx.saved_tensors
    setup: _Setup = ctx.setup
    products, wanted = setup.products, ctx.needs_input_grad
    grad_RD = _through_dropout(setup.take(grad_SD), masks[1], setup.dropout)
    grad_active_RF = _through_dropout(
        products.grad_rows(grad_RD, fc2_weight), masks[0], setup.activation_dropout
    )
    active_RF, grad_hidden_RH, grad_weights_R = activate_backward(
        setup.activation, grad_active_RF, hidden_RH, fc1_bias, setup.expert_R, weights_R, setup.num_rows
    )
    active_RF = _through_dropout(active_RF, masks[0], setup.activation_dropout)
    del grad_active_RF
    if grad_weights_R is not None and fc2_bias is not None:
        grad_weights_R = grad_weights_R + _dot_with_bias(setup.sums, grad_RD, fc2_bias, setup.num_rows)
    grad_fc2_weight = products.grad_weight(grad_RD, active_RF) if wanted[3] else None
    grad_fc2_bias = _sum_rows(setup.sums, grad_RD, weights_R) if wanted[4] else None
    del active_RF, grad_RD
    grad_fc1_weight = products.grad_weight(grad_hidden_RH, setup.take(source_SD)) if wanted[1] else None
    grad_fc1_bias = _sum_rows(setup.sums, grad_hidden_RH, None) if wanted[2] else None
    grad_source_SD = setup.put(products.grad_rows(grad_hidden_RH, fc1_weight)) if wanted[0] else None
    return (
        grad_source_SD,
        grad_fc1_weight,
        grad_fc1_bias,
        grad_fc2_weight,
        grad_fc2_bias,
        grad_weights_R if wanted[5] else None,
        None,
    )


def _dropped(values: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """Drop values at random, and return what was kept, as a mask."""
    return torch.native_dropout(values, probability, True) if probability > 0 else (values, None)


def _through_dropout(grad: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """Pass a gradient back through a dropout; or drop again what it dropped before."""
    if mask is None:
        return grad
    scale = 1 / (1 - probability) if probability < 1 else 0.0
    return torch.ops.aten.native_dropout_backward(grad, mask, scale)


def _sum_rows(products: Products, grad_RO: Tensor, weights_R: Tensor | None) -> Tensor:
    """Sum each expert's rows, times their weights: (R, O) -> (L, O)."""
    column_RI = grad_RO.new_zeros(len(grad_RO), _COLUMN)
    column_RI[:, 0] = 1 if weights_R is None else weights_R
    return products.grad_weight(grad_RO, column_RI)[:, :, 0].contiguous()


def _dot_with_bias(products: Products, grad_RD: Tensor, bias_LD: Tensor, num_rows: Tensor | None) -> Tensor:
    """Multiply each row with its expert's bias, and sum: (R,), 0 in rows that are nobody's."""
    dots_R = products.grad_rows(grad_RD, F.pad(bias_LD.unsqueeze(2), (0, _COLUMN - 1)))[:, 0]
    return zero_behind(dots_R, num_rows)
