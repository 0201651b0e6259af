"""Other people's MoE layers, where their packages are installed: T tokens, K = 2, all tokens kept.

``transformers`` and ``st-moe-pytorch`` have gated experts of three matrices; their hidden width is 2/3 of
ours, which gives the same number of floating-point operations.
"""

import sys
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

# ve-fairseq brings a torchaudio along; built for another torch it cannot be imported, and transformers with it.
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]

__all__ = ["PEERS", "Run", "Sizes", "mixtral_block"]

TOP_K = 2
Run = Callable[[Tensor], Tensor]


class Sizes(Protocol):
    """T tokens of width D, E experts of hidden width F."""

    @property
    def tokens(self) -> int: ...
    @property
    def model_dim(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...
    @property
    def experts(self) -> int: ...


def linear_loop(size: Sizes) -> tuple[nn.Module, Run]:
    """Textbook code: for each expert, find its tokens, apply its two Linear modules, add its outputs up."""
    router = nn.Linear(size.model_dim, size.experts, bias=False)
    experts = nn.ModuleList(
        nn.Sequential(
            nn.Linear(size.model_dim, size.hidden_dim), nn.GELU(), nn.Linear(size.hidden_dim, size.model_dim)
        )
        for _ in range(size.experts)
    )

    def run(x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = router(x_TD).softmax(-1).topk(TOP_K)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(experts):
            token, choice = torch.where(ids_TK == index)
            y_TD.index_add_(0, token, expert(x_TD[token]) * weights_TK[token, choice, None])
        return y_TD.sum()

    return nn.ModuleList([router, experts]), run


def mixtral_block(size: Sizes, *, hidden_dim: int, top_k: int, implementation: str) -> nn.Module:
    """transformers' Mixtral block with random weights."""
    from transformers import MixtralConfig  # type: ignore[import-not-found]
    from transformers.models.mixtral import modeling_mixtral  # type: ignore[import-not-found]

    config = MixtralConfig(
        hidden_size=size.model_dim,
        intermediate_size=hidden_dim,
        num_local_experts=size.experts,
        num_experts_per_tok=top_k,
        experts_implementation=implementation,
    )
    block = modeling_mixtral.MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.02)
    return block


def mixtral(implementation: str) -> Callable[[Sizes], tuple[nn.Module, Run]]:
    """transformers' Mixtral block with one of its implementations of the experts."""

    def build(size: Sizes) -> tuple[nn.Module, Run]:
        block = mixtral_block(size, hidden_dim=_gated_width(size), top_k=TOP_K, implementation=implementation)
        return block, lambda x_TD: block(x_TD.unsqueeze(0)).sum()

    return build


def st_moe(size: Sizes) -> tuple[nn.Module, Run]:
    """st-moe-pytorch with twice the mean load as capacity, and no threshold for second experts."""
    from st_moe_pytorch import MoE  # type: ignore[import-not-found]

    moe = MoE(
        dim=size.model_dim,
        num_experts=size.experts,
        expert_hidden_mult=size.hidden_dim / size.model_dim,  # it takes the 2/3 itself
        gating_top_n=TOP_K,
        threshold_train=1e-9,
        capacity_factor_train=float(TOP_K),
    )

    def run(x_TD: Tensor) -> Tensor:
        result = moe(x_TD.unsqueeze(0))
        return result.outputs.sum() + result.total_aux_loss

    return moe, run


def _gated_width(size: Sizes) -> int:
    return round(size.hidden_dim * 2 / 3 / 8) * 8


PEERS: dict[str, Callable[[Sizes], tuple[nn.Module, Run]]] = {
    "loop of Linear": linear_loop,
    "Mixtral eager": mixtral("eager"),
    "Mixtral grouped_mm": mixtral("grouped_mm"),
    "st-moe-pytorch": st_moe,
}
