"""Other packages' layers of SwiGLU experts with any number of experts per token, where they are installed.

Each maker returns a module and what runs it, tokens to outputs; its ImportError says that the package is missing.
SonicMoE's is written after its README and has not been tried; liger has no maker, because its layer of experts was not
at hand.
"""

from collections.abc import Callable
from typing import Protocol

from bench_peers import Sizes, mixtral_block
from torch import Tensor, nn

__all__ = ["PEERS", "LayerSize"]

Made = tuple[nn.Module, Callable[[Tensor], Tensor]]


class LayerSize(Sizes, Protocol):
    """T tokens of width D, E experts of hidden width F of which a token takes K."""

    @property
    def top_k(self) -> int: ...


def transformers_grouped(size: LayerSize) -> Made:
    """transformers' Mixtral block with torch's grouped product."""
    block = mixtral_block(size, hidden_dim=size.hidden_dim, top_k=size.top_k, implementation="grouped_mm")

    def run(x_TD: Tensor) -> Tensor:
        y = block(x_TD.unsqueeze(0))  # with its logits in releases before 5
        return y[0] if isinstance(y, tuple) else y

    return block, run


def scatter_moe(size: LayerSize) -> Made:
    """ScatterMoE's gated network behind a linear router."""
    from scattermoe.mlp import GLUMLP  # type: ignore[import-not-found]

    router = nn.Linear(size.model_dim, size.experts, bias=False)
    network = GLUMLP(
        input_size=size.model_dim,
        hidden_size=size.hidden_dim,
        num_experts=size.experts,
        top_k=size.top_k,
        activation=nn.SiLU(),
    )

    def run(x_TD: Tensor) -> Tensor:
        logits_TK, ids_TK = router(x_TD).topk(size.top_k)
        return network(x_TD, logits_TK.softmax(-1), ids_TK)

    return nn.ModuleList([router, network]), run


def sonic_moe(size: LayerSize) -> Made:
    """SonicMoE's layer, router included."""
    from sonicmoe import KernelBackendMoE, MoE  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    layer = MoE(
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        hidden_size=size.model_dim,
        intermediate_size=size.hidden_dim,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    )
    return layer, lambda x_TD: layer(x_TD, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0]


PEERS: dict[str, Callable[[LayerSize], Made]] = {
    "transformers grouped_mm": transformers_grouped,
    "ScatterMoE": scatter_moe,
    "SonicMoE": sonic_moe,
}
