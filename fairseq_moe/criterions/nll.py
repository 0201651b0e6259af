"""The summed negative log-likelihood of a large vocabulary, a few rows at a time.

``nll_loss(log_softmax(logits))`` writes three more tensors of the size of the logits (log-probabilities and two
gradients), which costs more time than the arithmetic. Here rows pass through the cache once in each direction and
the gradient takes the place of the logits. On CPU every number is computed by the same kernel on the same values, so
loss and gradient are equal to the bit; on a GPU ``fused.nll`` computes them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.fused.launch import runs_triton
from fairseq_moe.fused.nll import nll, nll_backward_

__all__ = ["block_size", "summed_nll", "wide_dtype"]

_BLOCK_NUMEL = 1 << 20  # log-probabilities at a time: 4 MiB, which caches hold


def summed_nll(logits_TV: Tensor, target_T: Tensor, *, ignore_index: int) -> Tensor:
    """Sum -log softmax(logits)[target] over tokens, in nats.

    The backward pass overwrites ``logits_TV``; a second one through the same logits is an error of torch's.

    Args:
        logits_TV: float scores of the vocabulary; V is the last axis.
        target_T: int64 vocabulary ids.
        ignore_index: tokens with this target are left out; it may lie outside the vocabulary.

    Returns:
        float32 scalar, or float64 where logits are.
    """
    kind = _FusedNll if runs_triton(logits_TV) and logits_TV.is_contiguous() else _SummedNll
    loss: Tensor = kind.apply(logits_TV, target_T, ignore_index)
    return loss


class _FusedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, ignore_index: int) -> Tensor:
        loss_T, log_sum_T = nll(logits_TV, target_T, ignore_index=ignore_index)
        ctx.save_for_backward(logits_TV, target_T, log_sum_T)
        ctx.ignore_index = ignore_index
        return loss_T.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, target_T, log_sum_T = ctx.saved_tensors
        nll_backward_(logits_TV, target_T, log_sum_T, grads[0], ignore_index=ctx.ignore_index)
        torch.autograd.graph.increment_version(
            logits_TV
        )  # a kernel has written, of which torch does not know
        return logits_TV, None, None


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits_TV, target_T)
        ctx.ignore_index = ignore_index
        ids_T1 = _ids(target_T, ignore_index)
        size = block_size(logits_TV)
        chosen = [
            F.log_softmax(logits, dim=-1, dtype=wide_dtype(logits)).gather(1, ids)
            for logits, ids in zip(logits_TV.split(size), ids_T1.split(size), strict=True)
        ]
        # As nll_loss adds them up: each row has one candidate left.
        which_T = torch.where(target_T == ignore_index, -100, 0)
        return F.nll_loss(torch.cat(chosen), which_T, ignore_index=-100, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, target_T = ctx.saved_tensors
        ids_T1 = _ids(target_T, ctx.ignore_index)
        is_left_out_T1 = (target_T == ctx.ignore_index).unsqueeze(1)
        grad_T1 = torch.where(is_left_out_T1, torch.zeros_like(grads[0]), -grads[0])
        size = block_size(logits_TV)
        of_chosen = grad_T1.new_zeros(min(size, len(logits_TV)), logits_TV.shape[1])
        blocks = (tensor.split(size) for tensor in (logits_TV, ids_T1, grad_T1))
        for logits, ids, grad in zip(*blocks, strict=True):
            log_probs = F.log_softmax(logits, dim=-1, dtype=wide_dtype(logits))
            upper = of_chosen[: len(logits)].scatter_(1, ids, grad)
            logits.copy_(torch._log_softmax_backward_data(upper, log_probs, -1, log_probs.dtype))
            upper.scatter_(1, ids, 0.0)
        return logits_TV, None, None


def _ids(target_T: Tensor, ignore_index: int) -> Tensor:
    """List the columns to read, (T, 1): where a target is left out any will do, and its id may be none of them."""
    return target_T.masked_fill(target_T == ignore_index, 0).unsqueeze(1)


def block_size(logits_TV: Tensor) -> int:
    """Count the rows of logits that caches hold: what is computed from them is still there when it is read."""
    return max(1, _BLOCK_NUMEL // max(1, logits_TV.shape[1]))


def wide_dtype(logits: Tensor) -> torch.dtype:
    """Choose what is computed in: float32, as stock does, or float64 where logits are."""
    return torch.promote_types(logits.dtype, torch.float32)
