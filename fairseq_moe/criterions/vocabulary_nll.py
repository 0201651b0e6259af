"""The summed negative log-likelihood where ranks have other positions, and other words, of a micro-batch's logits.

As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053) no rank sees all words of a position: each reduces its own to
a log-sum, and one small collective joins these; the gradient, softmax less one-hot, needs nothing from other ranks.
Sums of positions are added up over context alone: tensor ranks have the same ones. So every rank returns the loss of
the whole micro-batch, with the gradient of its own logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.criterions.nll import block_size, wide_dtype
from fairseq_moe.fused.launch import runs_triton
from fairseq_moe.fused.nll import nll, nll_backward_
from fairseq_moe.modules.shards import ShardedOutput, Shards

__all__ = ["sharded_nll"]

_LEFT_OUT = -1  # the column of a target that does not count, see ``ShardedOutput.columns_of``


def sharded_nll(logits_BSV: Tensor, target_BS: Tensor, output: ShardedOutput, *, ignore_index: int) -> Tensor:
    """Sum -log softmax(logits)[target] over all positions of a micro-batch, in nats, on every rank that shares it.

    The backward pass overwrites ``logits_BSV``, as that of ``summed_nll`` does. All ranks of the micro-batch call this
    together; how many collectives there are does not depend on the data.

    Args:
        logits_BSV: float scores of this rank's words at this rank's positions; V may be 0.
        target_BS: int64 vocabulary ids, of all positions.
        output: which words and positions these are.
        ignore_index: tokens with this target are left out; it may lie outside the vocabulary.

    Returns:
        float32 scalar, or float64 for logits of float64; infinite where a target that counts is no word.
    """
    own_target_BS = output.targets_of(target_BS, ignore_index=ignore_index)
    column_T = output.columns_of(own_target_BS, ignore_index=ignore_index).reshape(-1)
    logits_TV = logits_BSV.reshape(len(column_T), output.num_words)
    share: Tensor = _ShardedNll.apply(logits_TV, column_T, output.shards)
    return output.shards.total_over_context(share)


class _ShardedNll(torch.autograd.Function):
    """Sum over this rank's positions; the same on ranks that have other words of them."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, column_T: Tensor, shards: Shards) -> Tensor:
        own_3T = torch.stack([*_sums(logits_TV, column_T), _chosen(logits_TV, column_T)])
        highest_NT, total_NT, chosen_NT = shards.stack_over_tensor(own_3T).unbind(1)
        highest_T = highest_NT.amax(0)
        total_T = (total_NT * torch.exp(highest_NT - highest_T)).sum(0)
        ctx.save_for_backward(logits_TV, column_T, highest_T, total_T)
        # Small numbers first: a likely target has the highest logit, or nearly, however large that is.
        loss_T = (highest_T - chosen_NT.amax(0)) + total_T.log()
        return loss_T.masked_fill(column_T == _LEFT_OUT, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, column_T, highest_T, total_T = ctx.saved_tensors
        if _is_fused(logits_TV):
            log_sum_T = highest_T + total_T.log()
            nll_backward_(logits_TV, column_T, log_sum_T, grads[0], ignore_index=_LEFT_OUT)
            torch.autograd.graph.increment_version(
                logits_TV
            )  # a kernel has written, of which torch does not know
        elif logits_TV.numel() > 0:
            size = block_size(logits_TV)
            blocks = (tensor.split(size) for tensor in (logits_TV, column_T, highest_T, total_T))
            for logits, column, highest, total in zip(*blocks, strict=True):
                _write_gradient_(logits, column, highest, total, grads[0])
        return logits_TV, None, None


def _is_fused(logits_TV: Tensor) -> bool:
    return runs_triton(logits_TV) and logits_TV.is_contiguous() and logits_TV.numel() > 0


def _sums(logits_TV: Tensor, column_T: Tensor) -> tuple[Tensor, Tensor]:
    """Find the highest logit of this rank's words and the sum of exponentials less that; -inf and 0 without words.

    The kernel gives the logarithm of the sum of exponentials instead, less which their sum is 1.
    """
    if _is_fused(logits_TV):
        log_sum_T = nll(logits_TV, column_T, ignore_index=_LEFT_OUT)[1]
        return log_sum_T, torch.ones_like(log_sum_T)
    dtype = wide_dtype(logits_TV)
    highest_T = torch.full((len(logits_TV),), float("-inf"), dtype=dtype, device=logits_TV.device)
    total_T = torch.zeros_like(highest_T)
    if logits_TV.numel() > 0:
        size = block_size(logits_TV)
        blocks = (tensor.split(size) for tensor in (logits_TV, highest_T, total_T))
        for logits, highest, total in zip(*blocks, strict=True):
            torch.amax(logits.to(dtype), dim=1, out=highest)
            torch.sum((logits - highest.unsqueeze(1)).exp_(), dim=1, out=total)
    return highest_T, total_T


def _chosen(logits_TV: Tensor, column_T: Tensor) -> Tensor:
    """Look up the logits of targets; -inf at words of other ranks, so that the highest of all ranks is the target's."""
    is_own_T = (column_T >= 0) & (column_T < logits_TV.shape[1])
    index_T1 = column_T.masked_fill(~is_own_T, 0).unsqueeze(1)
    if logits_TV.shape[1] == 0:  # there is no column 0 to look up in its place
        logits_TV = logits_TV.new_zeros(len(logits_TV), 1)
    return (
        logits_TV.gather(1, index_T1)
        .squeeze(1)
        .to(wide_dtype(logits_TV))
        .masked_fill(~is_own_T, float("-inf"))
    )


def _write_gradient_(
    logits_TV: Tensor, column_T: Tensor, highest_T: Tensor, total_T: Tensor, grad: Tensor
) -> None:
    """Write (softmax - one-hot) * grad over the logits of a few rows; zeros over those that are left out."""
    column_T1 = column_T.unsqueeze(1)
    is_own_T1 = (column_T1 >= 0) & (column_T1 < logits_TV.shape[1])
    # Computed in the logits' own memory where they are wide enough.
    values_TV = logits_TV.to(highest_T.dtype).sub_(highest_T.unsqueeze(1)).exp_()
    values_TV.mul_((grad / total_T).unsqueeze(1))
    values_TV.scatter_add_(1, column_T1.masked_fill(~is_own_T1, 0), -grad * is_own_T1)
    values_TV.masked_fill_(column_T1 == _LEFT_OUT, 0.0)
    if values_TV is not logits_TV:
        logits_TV.copy_(values_TV)
