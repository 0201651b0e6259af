"""Compute the negative log-likelihood of a large vocabulary, reading each row of logits once in each direction.

Forward keeps one number per token, the logarithm of the sum of exponentials; backward writes the gradient over the
logits. ``nll_loss(log_softmax(logits.float()))`` writes a float32 copy of the logits, the log-probabilities and two
gradients, which for 50,000 words and 8,192 tokens are 1.6 GB each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.fused.launch import block_of, jit, tl

__all__ = ["nll", "nll_backward_", "nll_backward_slowly", "nll_slowly"]

_BLOCK_V = 4096


def nll(logits_TV: Tensor, target_T: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute -log softmax(logits)[target] for each token, by the kernel.

    Args:
        logits_TV: float32, float16 or bfloat16, contiguous, where kernels run.
        target_T: int64 vocabulary ids.
        ignore_index: tokens with this target get 0; it may lie outside the vocabulary.

    Returns:
        float32 (T,), in nats, NaN for a target that is no word; and float32 (T,), the logarithm of the sum of
        exponentials, for the gradient.
    """
    num_tokens, vocabulary = logits_TV.shape
    loss_T = torch.empty(num_tokens, dtype=torch.float32, device=logits_TV.device)
    log_sum_T = torch.empty_like(loss_T)
    if num_tokens > 0:
        _nll[(num_tokens,)](
            logits_TV,
            target_T.contiguous(),
            loss_T,
            log_sum_T,
            vocabulary,
            ignore_index,
            BLOCK_V=block_of(vocabulary, most=_BLOCK_V),
            num_warps=8,
        )
    return loss_T, log_sum_T


@jit
def _nll(
    logits: tl.tensor,
    target_of: tl.tensor,
    loss: tl.tensor,
    log_sum: tl.tensor,
    vocabulary: tl.tensor,
    ignore_index: tl.tensor,
    BLOCK_V: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocabulary
    # Of each lane, its largest logit so far, and the sum of exponentials less that.
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        values = tl.load(row + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, values)
        # A lane without a finite logit has nothing to rescale.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(values - shift)
        largest = higher
    highest = tl.max(largest, axis=0)
    log_total = highest + tl.log(tl.sum(total * tl.exp(largest - highest), axis=0))
    target = tl.load(target_of + token)
    is_counted = target != ignore_index
    # Beyond the vocabulary lies the row of another token: such a target makes the loss NaN, and the update is skipped.
    is_word = (target >= 0) & (target < vocabulary)
    chosen = tl.load(row + target, mask=is_counted & is_word, other=0.0).to(tl.float32)
    value = tl.where(is_word, log_total - chosen, float("nan"))
    tl.store(log_sum + token, log_total)
    tl.store(loss + token, tl.where(is_counted, value, 0.0))


def nll_backward_(
    logits_TV: Tensor, target_T: Tensor, log_sum_T: Tensor, grad: Tensor, *, ignore_index: int
) -> Tensor:
    """Write the gradient of the summed loss over the logits, by the kernel.

    Args:
        logits_TV: as for ``nll``.
        target_T: as for ``nll``.
        log_sum_T: what that returned.
        grad: float scalar on the device, gradient of the sum.
        ignore_index: as for ``nll``.

    Returns:
        ``logits_TV``.
    """
    num_tokens, vocabulary = logits_TV.shape
    if num_tokens > 0:
        _nll_backward[(num_tokens,)](
            logits_TV,
            target_T.contiguous(),
            log_sum_T,
            grad,
            vocabulary,
            ignore_index,
            BLOCK_V=block_of(vocabulary, most=_BLOCK_V),
            num_warps=8,
        )
    return logits_TV


@jit
def _nll_backward(
    logits: tl.tensor,
    target_of: tl.tensor,
    log_sum: tl.tensor,
    grad: tl.tensor,
    vocabulary: tl.tensor,
    ignore_index: tl.tensor,
    BLOCK_V: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocabulary
    target = tl.load(target_of + token)
    log_total = tl.load(log_sum + token)
    upper = tl.where(target == ignore_index, 0.0, tl.load(grad).to(tl.float32))
    for start in tl.range(0, vocabulary, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        values = tl.load(row + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        difference = tl.exp(values - log_total) - tl.where(column == target, 1.0, 0.0)
        # Not a product alone: a logit that is not finite must not reach a token that is left out.
        written = tl.where(upper == 0.0, 0.0, upper * difference)
        tl.store(row + column, written.to(logits.dtype.element_ty), mask=column < vocabulary)


def nll_slowly(logits_TV: Tensor, target_T: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute ``nll`` in plain torch."""
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    log_probs_TV = F.log_softmax(wide_TV, dim=-1)
    loss_T = F.nll_loss(log_probs_TV, target_T, ignore_index=ignore_index, reduction="none")
    return loss_T, torch.logsumexp(wide_TV, dim=-1)


def nll_backward_slowly(
    logits_TV: Tensor, target_T: Tensor, log_sum_T: Tensor, grad: Tensor, *, ignore_index: int
) -> Tensor:
    """Compute the gradient that ``nll_backward_`` writes, in plain torch and in memory of its own."""
    probs_TV = torch.exp(logits_TV.to(log_sum_T.dtype) - log_sum_T.unsqueeze(1))
    is_left_out_T1 = (target_T == ignore_index).unsqueeze(1)
    index_T1 = target_T.unsqueeze(1).masked_fill(is_left_out_T1, 0)
    probs_TV = probs_TV.scatter_add(1, index_T1, -torch.ones_like(index_T1, dtype=probs_TV.dtype))
    return (probs_TV * grad).masked_fill(is_left_out_T1, 0.0).to(logits_TV.dtype)
