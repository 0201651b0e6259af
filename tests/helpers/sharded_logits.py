"""Micro-batches whose logits are spread over ranks: this rank's part, and what one process computes of the whole."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AXES", "OUTSIDE", "PAD", "UPPER", "Found", "compare", "micro_batch", "num_ranks", "part_of_rank"]

B, PAD = 3, 1
OUTSIDE = -100  # an ignore_index that is no word
AXES = [{"tensor": 2}, {"tensor": 4}, {"context": 2}, {"tensor": 2, "context": 2}]
UPPER = 0.3  # gradient of the loss


class Found(NamedTuple):
    """What a rank has computed, and what one process computes of the whole."""

    loss: Tensor
    whole_loss: Tensor
    grad: Tensor
    whole_grad: Tensor


def micro_batch(
    length: int, words: int, dtype: torch.dtype, *, ignore_index: int = OUTSIDE, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits and targets of a whole micro-batch; a row is padded, and other targets are left out, too."""
    generator = torch.Generator().manual_seed(length * 100 + words)
    logits_BSV = scale * torch.randn(B, length, words, generator=generator, dtype=torch.float64)
    target_BS = torch.randint(0, words, (B, length), generator=generator)
    target_BS[0, length // 2 :] = ignore_index
    target_BS[2, 0] = ignore_index
    return logits_BSV.to(dtype), target_BS


def part_of_rank(mesh: Any, whole_BSV: Tensor) -> tuple[Tensor, Any]:
    """This rank's logits, those of absent positions NaN, and what they are a part of."""
    from fairseq_moe.distributed.sequence import shards_of
    from fairseq_moe.modules.parts import part_slices
    from fairseq_moe.modules.shards import ShardedOutput

    shards = shards_of(mesh)
    _, length, words = whole_BSV.shape
    [own] = part_slices(words, index=shards.tensor_index, count=shards.tensor)
    output = ShardedOutput(
        shards=shards, part=shards.part_of(length), first_word=own.start, num_words=own.stop - own.start
    )
    part = output.part.of_context(whole_BSV[:, :, own], dim=1, filler=float("nan"))
    return part.contiguous(), output


def compare(axes: dict[str, int], logits_BSV: Tensor, target_BS: Tensor, *, ignore_index: int) -> Found:
    """Compute a part on this rank; and the whole, in float64 of the same logits, as torch does."""
    from fairseq_moe.criterions.vocabulary_nll import sharded_nll
    from fairseq_moe.distributed.mesh import parallel_mesh

    whole = logits_BSV.double().clone().requires_grad_()
    whole_loss = F.cross_entropy(
        whole.flatten(0, 1), target_BS.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    (whole_loss * UPPER).backward()
    assert whole.grad is not None
    part, output = part_of_rank(parallel_mesh(4, **axes), logits_BSV)
    leaf = part.requires_grad_()
    loss = sharded_nll(leaf * 1, target_BS, output, ignore_index=ignore_index)
    (loss * UPPER).backward()
    assert leaf.grad is not None
    own = slice(output.first_word, output.first_word + output.num_words)
    whole_grad = output.part.of_context(whole.grad[:, :, own], dim=1)  # of absent positions 0
    return Found(loss.detach(), whole_loss.detach(), leaf.grad, whole_grad)


def num_ranks(axes: dict[str, int]) -> int:
    return axes.get("tensor", 1) * axes.get("context", 1)
