"""Choose each token's K best experts by its router logits: scores, choice, weights, counts and entropy in one pass.

The common rule of the top-k family: softmax or sigmoid scores, an expert bias or none, no groups and no capacity. Of
equal scores the lower expert id wins, in every run; ``torch.topk`` leaves open which, so a choice may differ from its
only where scores are equal to the bit. All is computed in float32.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_moe.fused.launch import block_of, cdiv, runs_triton
from fairseq_moe.fused.top_k_kernels import choose_experts, pass_back_to_logits

__all__ = ["Scoring", "TopK", "runs_top_k", "top_k", "top_k_slowly"]

_MOST_EXPERTS = 1024  # a token's scores stand in registers
_MOST_CHOICES = 64
# Guesses, not measured on a GPU. Each program adds its counts to the histogram once, so there are not many programs.
_TILE = 1024
_MOST_PROGRAMS = 512
_TINY = 1e-20  # keeps a sum of sigmoids from being 0; the kernels have it as a literal


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Say what a logit means.

    Args:
        kind: ``chosen`` weighs by the softmax over the chosen logits; ``softmax`` by probabilities over all experts,
            by which they are compared, too; ``sigmoid`` by sigmoids, divided by the sum of the chosen ones if K > 1.
        top_k: K.
        scale: multiplies all weights.
        by_probability: ``chosen`` compares experts by probabilities over all of them, not by logits.
    """

    kind: str
    top_k: int
    scale: float = 1.0
    by_probability: bool = False

    @property
    def by_gates(self) -> bool:
        """Tell whether experts are compared by probabilities over all of them."""
        return self.kind == "softmax" or (self.kind == "chosen" and self.by_probability)


class TopK(NamedTuple):
    """Hold what the logits of tokens say.

    Args:
        weights_TK: differentiable, of each choice, in the dtype of the logits; 0 for padding.
        gates_TE: float32, differentiable, scores that sum to 1 for each token.
        entropy_T: float32, of the gates in nats, 0 for padding.
        ids_TK: int64, chosen experts, best first.
        histogram_34E: int64, choices (first, second, all later ones) by fate (kept, two that there are none of here,
            padding) and by expert; None for choices that were given.
    """

    weights_TK: Tensor
    gates_TE: Tensor
    entropy_T: Tensor
    ids_TK: Tensor
    histogram_34E: Tensor | None


def runs_top_k(logits_TE: Tensor, *, top_k: int) -> bool:
    """Tell whether the kernel takes these logits."""
    return runs_triton(logits_TE) and logits_TE.shape[1] <= _MOST_EXPERTS and top_k <= _MOST_CHOICES


def top_k(
    logits_TE: Tensor,
    scoring: Scoring,
    *,
    bias_E: Tensor | None = None,
    padding_T: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> TopK:
    """Choose experts, weigh them and count the choices.

    Args:
        logits_TE: float.
        scoring: what they mean.
        bias_E: float, added to what experts are compared by; it moves choices and never weights.
        padding_T: bool, tokens whose choices weigh nothing.
        ids_TK: int64, choices made before; None: they are made here.
    """
    if not runs_top_k(logits_TE, top_k=scoring.top_k):
        return top_k_slowly(logits_TE, scoring, bias_E=bias_E, padding_T=padding_T, ids_TK=ids_TK)
    mask_T = None if padding_T is None else padding_T.contiguous().view(torch.uint8)
    given_TK = None if ids_TK is None else ids_TK.contiguous()
    weights_TK, gates_TE, entropy_T, found_TK, histogram_34E = _TopK.apply(
        logits_TE.contiguous(), scoring, bias_E, mask_T, given_TK
    )
    return TopK(weights_TK, gates_TE, entropy_T, found_TK if ids_TK is None else ids_TK, histogram_34E)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        scoring: Scoring,
        bias_E: Tensor | None,
        mask_T: Tensor | None,
        given_TK: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        num_tokens, num_experts = logits_TE.shape
        shape = num_tokens, scoring.top_k
        found_TK = histogram_34E = None
        if given_TK is None:
            found_TK = logits_TE.new_empty(shape, dtype=torch.int64)
            histogram_34E = logits_TE.new_zeros((3, 4, num_experts), dtype=torch.int64)
        ids_TK = found_TK if given_TK is None else given_TK
        weights_TK = logits_TE.new_empty(shape)
        gates_TE = torch.empty_like(logits_TE, dtype=torch.float32)
        entropy_T = logits_TE.new_empty(num_tokens, dtype=torch.float32)
        ctx.save_for_backward(logits_TE, ids_TK, mask_T)
        ctx.scoring = scoring
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            entropy_T, *(each for each in (found_TK, histogram_34E) if each is not None)
        )
        blocks = _blocks(num_experts, scoring.top_k)
        num_tiles, tiles = cdiv(num_tokens, blocks["BLOCK_T"]), 1
        while given_TK is None and cdiv(num_tiles, tiles) > _MOST_PROGRAMS:
            tiles *= 2
        if num_tokens > 0:
            choose_experts[(cdiv(num_tiles, tiles),)](
                *(logits_TE, bias_E, mask_T, ids_TK, weights_TK, gates_TE, entropy_T, histogram_34E),
                *(num_tokens, num_experts, scoring.scale),
                KIND=scoring.kind,
                TOP_K=scoring.top_k,
                HAS_BIAS=bias_E is not None,
                HAS_PADDING=mask_T is not None,
                CHOOSES=given_TK is None,
                BY_GATES=scoring.by_gates,
                TILES=tiles,
                **blocks,
            )
        return weights_TK, gates_TE, entropy_T, found_TK, histogram_34E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_TE, ids_TK, mask_T = ctx.saved_tensors
        grad_weights_TK, grad_gates_TE = (None if grad is None else grad.contiguous() for grad in grads[:2])
        num_tokens, num_experts = logits_TE.shape
        grad_TE = torch.empty_like(logits_TE)
        blocks = _blocks(num_experts, ctx.scoring.top_k)
        if num_tokens > 0:
            pass_back_to_logits[(cdiv(num_tokens, blocks["BLOCK_T"]),)](
                *(logits_TE, mask_T, ids_TK, grad_weights_TK, grad_gates_TE, grad_TE),
                *(num_tokens, num_experts, ctx.scoring.scale),
                KIND=ctx.scoring.kind,
                TOP_K=ctx.scoring.top_k,
                HAS_PADDING=mask_T is not None,
                HAS_WEIGHTS=grad_weights_TK is not None,
                HAS_GATES=grad_gates_TE is not None,
                **blocks,
            )
        return grad_TE, None, None, None, None


def _blocks(num_experts: int, top_k: int) -> dict[str, int]:
    """Choose how many tokens, experts and choices a program holds at once."""
    block_e = max(block_of(num_experts, most=_MOST_EXPERTS), 16)
    block_k = block_of(top_k, most=_MOST_CHOICES)
    return {"BLOCK_T": max(_TILE // block_e, 1), "BLOCK_E": block_e, "BLOCK_K": block_k}


def top_k_slowly(
    logits_TE: Tensor,
    scoring: Scoring,
    *,
    bias_E: Tensor | None = None,
    padding_T: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> TopK:
    """Compute ``top_k`` in plain torch, operation by operation."""
    num_experts = logits_TE.shape[1]
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    raw_TE = torch.sigmoid(wide_TE) if scoring.kind == "sigmoid" else torch.softmax(wide_TE, -1)
    gates_TE = raw_TE / (raw_TE.sum(-1, keepdim=True) + _TINY) if scoring.kind == "sigmoid" else raw_TE
    histogram_34E = None
    counted_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool) if padding_T is None else ~padding_T
    if ids_TK is None:
        compared_TE = (wide_TE if scoring.kind == "chosen" and not scoring.by_gates else raw_TE).detach()
        if bias_E is not None:
            compared_TE = compared_TE + bias_E
        # A stable sort, for of equal scores the lower id comes first.
        ids_TK = (
            compared_TE.sort(dim=-1, descending=True, stable=True).indices[:, : scoring.top_k].contiguous()
        )
        chosen_TKE = torch.nn.functional.one_hot(ids_TK, num_experts)
        histogram_34E = chosen_TKE.new_zeros(3, 4, num_experts)
        for fate, of_fate_T in ((0, counted_T), (3, ~counted_T)):
            counts_KE = chosen_TKE[of_fate_T].sum(0)
            for choice, counts_E in enumerate(counts_KE):
                histogram_34E[min(choice, 2), fate] += counts_E
    if scoring.kind == "chosen":
        weights_TK = torch.softmax(wide_TE.gather(-1, ids_TK), -1)
    else:
        weights_TK = raw_TE.gather(-1, ids_TK)
        if scoring.kind == "sigmoid" and scoring.top_k > 1:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    weights_TK = (weights_TK * scoring.scale * counted_T.unsqueeze(-1)).to(logits_TE.dtype)
    eps = torch.finfo(torch.float32).eps
    wide_gates_TE = gates_TE.detach()
    entropy_T = -(wide_gates_TE * wide_gates_TE.clamp(min=eps, max=1 - eps).log()).sum(-1) * counted_T
    return TopK(weights_TK, gates_TE, entropy_T, ids_TK, histogram_34E)
