"""Three kernels that multiply all rows with fc1 before any row with fc2; they differ in how one matrix is applied.

Routing weights, where the rows have them, are applied between activation and fc2 if the experts have no biases, and
else to the outputs, which are then kept for the weights' gradient.
"""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.rows import ExpertWork, combine_rows, take_rows
from fairseq_moe.modules.kernels.activation import weighted_activation
from fairseq_moe.modules.kernels.contract import Network, Stacks, device_counts
from fairseq_moe.modules.kernels.linear import batched_linear, grouped_linear, loop_linear

__all__ = ["batched_network", "grouped_network", "loop_network"]

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def loop_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with one product per expert and matrix, in ``network.wide``."""
    work = work.on_host()
    linear = functools.partial(loop_linear, counts_L=work.host_counts(), wide=network.wide)
    return _by_matrix(linear, source_SD, stacks, work, network)


def batched_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with one batched product per matrix, in the rows' own dtype."""
    work = work.on_host()
    linear = functools.partial(batched_linear, counts_L=work.host_counts())
    return _by_matrix(linear, source_SD, stacks, work, network)


def grouped_network(source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network) -> Tensor:
    """Compute the experts with one ``grouped_mm`` per matrix, in the rows' own dtype."""
    work = work.sized()
    linear = functools.partial(grouped_linear, counts_L=device_counts(work, source_SD.device))
    return _by_matrix(linear, source_SD, stacks, work, network)


def _by_matrix(
    linear: Linear, source_SD: Tensor, stacks: Stacks, work: ExpertWork, network: Network
) -> Tensor:
    rows_RD = source_SD if work.plan is None else take_rows(source_SD, work.plan)
    hidden_RF = linear(rows_RD, stacks.fc1_weight, stacks.fc1_bias)
    weights_R = work.weights_R
    if weights_R is not None and stacks.fc2_bias is None:
        active_RF = weighted_activation(network.activation, hidden_RF, weights_R)
        weights_R = None
    else:
        active_RF = network.activation(hidden_RF)
    active_RF = F.dropout(active_RF, network.activation_dropout, training=network.activation_dropout > 0)
    y_RD = linear(active_RF, stacks.fc2_weight, stacks.fc2_bias)
    y_RD = F.dropout(y_RD, network.dropout, training=network.dropout > 0)
    return y_RD if work.plan is None else combine_rows(y_RD, weights_R, work.plan)
