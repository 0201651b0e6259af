"""Kernels that multiply all rows with fc1 before any row with fc2; they differ in how one matrix is applied.

``loop`` and ``bmm`` need the counts on the host. On a CPU they are for what ``sliced`` cannot do and for small experts,
where calls cost more than memory: there they keep what autograd keeps (``composed_network``). On a GPU all of them keep
the values before the activation alone (``lean.lean_network``).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.modules.dispatch.rows import ExpertWork, combine_rows, take_rows
from fairseq_moe.modules.kernels.activation import weigh_activation
from fairseq_moe.modules.kernels.contract import Network, Stacks, device_counts
from fairseq_moe.modules.kernels.fp8 import Fp8Mode, Fp8Products
from fairseq_moe.modules.kernels.lean import lean_network
from fairseq_moe.modules.kernels.matrix import Gradients
from fairseq_moe.modules.kernels.products import (
    BatchedProducts,
    BiasedProducts,
    GroupedProducts,
    LoopProducts,
    Products,
    TritonProducts,
)

__all__ = [
    "batched_network",
    "composed_network",
    "fp8_network",
    "grouped_network",
    "loop_network",
    "triton_network",
]


def loop_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with one product per expert and matrix, in ``network.wide``."""
    work = work.on_host()
    products = LoopProducts(work.host_counts(), wide=network.wide)
    return _network_with_counts(products, source_SD, stacks, work, network)


def batched_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with one batched product per matrix, in the rows' own dtype."""
    work = work.on_host()
    return _network_with_counts(BatchedProducts(work.host_counts()), source_SD, stacks, work, network)


def grouped_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with one ``grouped_mm`` per matrix, in the rows' own dtype; nothing waits for the device."""
    products = GroupedProducts(device_counts(work, source_SD.device).cumsum(0).to(torch.int32))
    return lean_network(products, source_SD, stacks, work, network)


def triton_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with one launch of our own product per matrix; nothing waits for the device."""
    products = TritonProducts(device_counts(work, source_SD.device), dtype=source_SD.dtype)
    return lean_network(products, source_SD, stacks, work, network)


def fp8_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with products in FP8, those that pay; nothing waits for the device on a GPU.

    What is not in FP8 is multiplied by ``grouped_mm`` beside torch's own FP8, and else by what takes any dtype.
    """
    assert network.fp8 is not None
    mode, counts_L = Fp8Mode(network.fp8), device_counts(work, source_SD.device)
    ends_L = counts_L.cumsum(0).to(torch.int32)
    wide: Products
    if mode is Fp8Mode.NATIVE and source_SD.dtype == torch.bfloat16:
        wide = GroupedProducts(ends_L)
    elif source_SD.device.type == "cpu":
        work = work.on_host()
        wide = LoopProducts(work.host_counts(), wide=torch.promote_types(network.wide, torch.float32))
    else:
        # Tiles that fit the widest operands: emulation multiplies what it has quantised in float32.
        dtype = torch.float32 if mode is Fp8Mode.EMULATE else source_SD.dtype
        wide = TritonProducts(counts_L, dtype=dtype)
    products = Fp8Products(mode, wide, ends_L, is_sized=work.is_sized)
    return lean_network(products, source_SD, stacks, work, network, sums=wide)


def _network_with_counts(
    products: BiasedProducts, source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network
) -> Tensor:
    kind = composed_network if source_SD.device.type == "cpu" else lean_network
    return kind(products, source_SD, stacks, work, network)


def composed_network(
    products: BiasedProducts, source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network
) -> Tensor:
    """Compute the experts by autograd's rules, one operation after the other.

    Routing weights, where the rows have them, are applied between activation and fc2 if the experts have no biases, and
    else to the outputs, which are then kept for the weights' gradient.
    """
    rows_RD = source_SD if work.plan is None else take_rows(source_SD, work.plan)
    hidden_RF = _ExpertLinear.apply(rows_RD, stacks.fc1_weight, stacks.fc1_bias, products)
    weights_R = work.weights_R
    if weights_R is not None and stacks.fc2_bias is None:
        active_RF = weigh_activation(network.activation, hidden_RF, weights_R)
        weights_R = None
    else:
        active_RF = network.activation(hidden_RF)
    active_RF = F.dropout(active_RF, network.activation_dropout, training=network.activation_dropout > 0)
    y_RD = _ExpertLinear.apply(active_RF, stacks.fc2_weight, stacks.fc2_bias, products)
    y_RD = F.dropout(y_RD, network.dropout, training=network.dropout > 0)
    return y_RD if work.plan is None else combine_rows(y_RD, weights_R, work.plan)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None, products: BiasedProducts
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_LOI)
        ctx.products = products
        return products.affine_outputs(x_RI, weight_LOI, bias_LO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x_RI, weight_LOI = ctx.saved_tensors
        products: BiasedProducts = ctx.products
        grad_RO = grads[0].contiguous()
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with torch.autocast(x_RI.device.type, enabled=False):
            return (
                products.grad_rows(grad_RO, weight_LOI) if wants_x else None,
                products.grad_weight(grad_RO, x_RI) if wants_weight else None,
                products.grad_bias(grad_RO) if wants_bias else None,
                None,
            )
