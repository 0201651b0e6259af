"""Multiply the rows of each expert with its matrix in three directions: expert by expert, padded at once, or grouped.

The directions are outputs, the gradient of the rows, and the gradient of the matrix. They are spelled out, because
autograd's own gradient of a slice of a stack is a stack of zeros with one slice filled: here every slice is written
once, where it belongs.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fairseq_moe.fused.grouped_product import (
    grouped_grad_rows,
    grouped_grad_weight,
    grouped_outputs,
    row_tiles,
)
from fairseq_moe.modules.kernels import cpu_memory
from fairseq_moe.modules.kernels.matrix import affine, mm_into

__all__ = [
    "BatchedProducts",
    "BiasedProducts",
    "GroupedProducts",
    "LoopProducts",
    "Products",
    "TritonProducts",
]


class Products(Protocol):
    """Multiply the rows of each expert with its matrix; made for one forward pass, whose rows per expert it knows.

    Rows behind those that an expert has, where the host does not know how many there are, are nobody's: they reach no
    gradient of a matrix, and what stands in them afterwards is arbitrary.
    """

    def outputs(self, x_RI: Tensor, weight_LOI: Tensor) -> Tensor:
        """Multiply forward: y = x W[l]^T, (R, I) -> (R, O)."""
        ...

    def grad_rows(self, grad_RO: Tensor, weight_LOI: Tensor) -> Tensor:
        """Pass the gradient back to the rows: grad W[l], (R, O) -> (R, I)."""
        ...

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Sum each expert's gradient of its matrix: grad^T x, (L, O, I), contiguous; zeros for one without rows."""
        ...


class BiasedProducts(Products, Protocol):
    """Add a bias in the same product, for kernels whose counts the host knows."""

    def affine_outputs(self, x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None) -> Tensor:
        """Multiply forward: y = x W[l]^T (+ b[l]), (R, I) -> (R, O)."""
        ...

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        """Sum each expert's gradient of its bias: (R, O) -> (L, O)."""
        ...


class LoopProducts:
    """Multiply expert after expert.

    Args:
        counts_L: rows of each expert.
        wide: dtype of the products, at least as wide as that of the rows.
    """

    def __init__(self, counts_L: tuple[int, ...], *, wide: torch.dtype) -> None:
        self.counts_L = counts_L
        self.wide = wide

    def outputs(self, x_RI: Tensor, weight_LOI: Tensor) -> Tensor:
        """Multiply rows with matrices; see ``Products``."""
        return self.affine_outputs(x_RI, weight_LOI, None)

    def affine_outputs(self, x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None) -> Tensor:
        """Multiply, and add biases; see ``BiasedProducts``."""
        y_RO = x_RI.new_empty((x_RI.shape[0], weight_LOI.shape[1]))
        for expert, (x, y) in enumerate(zip(self._parts(x_RI), self._parts(y_RO), strict=True)):
            bias = None if bias_LO is None else bias_LO[expert]
            affine(x.to(self.wide), weight_LOI[expert].to(self.wide), bias, out=y)
        return y_RO

    def grad_rows(self, grad_RO: Tensor, weight_LOI: Tensor) -> Tensor:
        """Pass the gradient back to the rows; see ``Products``."""
        grad_x_RI = grad_RO.new_empty((grad_RO.shape[0], weight_LOI.shape[2]))
        for expert, (grad, to) in enumerate(zip(self._parts(grad_RO), self._parts(grad_x_RI), strict=True)):
            mm_into(to, grad.to(self.wide), weight_LOI[expert].to(self.wide))
        return grad_x_RI

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Sum the gradients of the matrices; see ``Products``."""
        shape = (len(self.counts_L), grad_RO.shape[1], x_RI.shape[1])
        grad_weight_LOI = cpu_memory.empty(shape, like=x_RI)
        for to, grad, x in zip(grad_weight_LOI, self._parts(grad_RO), self._parts(x_RI), strict=True):
            mm_into(to, grad.to(self.wide).t(), x.to(self.wide))
        return grad_weight_LOI

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        """Sum the gradients of the biases; see ``BiasedProducts``."""
        sums = [grad.to(self.wide).sum(0) for grad in self._parts(grad_RO)]
        return torch.stack(sums).to(grad_RO.dtype)

    def _parts(self, values_RI: Tensor) -> tuple[Tensor, ...]:
        return values_RI.split(self.counts_L)


class BatchedProducts:
    """Multiply all experts at once; their rows are padded with zeros to the busiest one's, unless all have as many.

    Args:
        counts_L: rows of each expert.
    """

    def __init__(self, counts_L: tuple[int, ...]) -> None:
        self.counts_L = counts_L
        self.num_padded_rows = max(counts_L)
        self.is_even = min(counts_L) == self.num_padded_rows

    def outputs(self, x_RI: Tensor, weight_LOI: Tensor) -> Tensor:
        """Multiply rows with matrices; see ``Products``."""
        return self.affine_outputs(x_RI, weight_LOI, None)

    def affine_outputs(self, x_RI: Tensor, weight_LOI: Tensor, bias_LO: Tensor | None) -> Tensor:
        """Multiply, and add biases; see ``BiasedProducts``."""
        x_LCI, weight_LIO = self._pad(x_RI), weight_LOI.transpose(1, 2)
        if bias_LO is None:
            return self._unpad(torch.bmm(x_LCI, weight_LIO))
        return self._unpad(torch.baddbmm(bias_LO.unsqueeze(1), x_LCI, weight_LIO))

    def grad_rows(self, grad_RO: Tensor, weight_LOI: Tensor) -> Tensor:
        """Pass the gradient back to the rows; see ``Products``."""
        return self._unpad(torch.bmm(self._pad(grad_RO), weight_LOI))

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Sum the gradients of the matrices; see ``Products``."""
        return torch.bmm(self._pad(grad_RO).transpose(1, 2), self._pad(x_RI))

    def grad_bias(self, grad_RO: Tensor) -> Tensor:
        """Sum the gradients of the biases; see ``BiasedProducts``."""
        return self._pad(grad_RO).sum(1)

    def _pad(self, values_RI: Tensor) -> Tensor:
        if self.is_even:
            return values_RI.reshape(len(self.counts_L), self.num_padded_rows, values_RI.shape[1])
        return pad_sequence(list(values_RI.split(self.counts_L)), batch_first=True)

    def _unpad(self, values_LCO: Tensor) -> Tensor:
        if self.is_even:
            return values_LCO.reshape(-1, values_LCO.shape[2])
        parts = zip(values_LCO, self.counts_L, strict=True)
        return torch.cat([values_CO[:count] for values_CO, count in parts])


class GroupedProducts:
    """Multiply all experts at once by torch's ``grouped_mm``: not in float64, and rows of a multiple of 16 bytes.

    Args:
        ends_L: int32, on the device of the rows, where each expert's rows end: nothing waits for it on the host.
    """

    def __init__(self, ends_L: Tensor) -> None:
        self.ends_L = ends_L

    def outputs(self, x_RI: Tensor, weight_LOI: Tensor) -> Tensor:
        """Multiply rows with matrices; see ``Products``."""
        return F.grouped_mm(x_RI.contiguous(), weight_LOI.transpose(1, 2), offs=self.ends_L)

    def grad_rows(self, grad_RO: Tensor, weight_LOI: Tensor) -> Tensor:
        """Pass the gradient back to the rows; see ``Products``."""
        return F.grouped_mm(grad_RO.contiguous(), weight_LOI, offs=self.ends_L)  # refuses expanded gradients

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Sum the gradients of the matrices; see ``Products``."""
        return F.grouped_mm(grad_RO.contiguous().t(), x_RI.contiguous(), offs=self.ends_L)


class TritonProducts:
    """Multiply all experts at once by our own grouped product: any width, any dtype but float64.

    Args:
        counts_L: int64, rows of each expert, on their device: nothing waits for it on the host.
        dtype: of the rows.
    """

    def __init__(self, counts_L: Tensor, *, dtype: torch.dtype) -> None:
        self.tiles = row_tiles(counts_L, dtype=dtype)

    def outputs(self, x_RI: Tensor, weight_LOI: Tensor) -> Tensor:
        """Multiply rows with matrices; see ``Products``."""
        return grouped_outputs(x_RI, weight_LOI, self.tiles)

    def grad_rows(self, grad_RO: Tensor, weight_LOI: Tensor) -> Tensor:
        """Pass the gradient back to the rows; see ``Products``."""
        return grouped_grad_rows(grad_RO, weight_LOI, self.tiles)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Sum the gradients of the matrices; see ``Products``."""
        return grouped_grad_weight(grad_RO, x_RI, self.tiles)
