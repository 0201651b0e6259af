"""Predict further tokens with blocks of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Block k sees, at position t, what the model or the block before it made of the tokens up to t + k, and the
embedding of the token after them; through the model's own output projection it guesses the token after that.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.models.block_layer import build_norm, init_weights
from fairseq_moe.modules import MoEAux, TokenInfo

__all__ = ["MTPBlock"]


class MTPBlock(nn.Module):
    """Compute norm(layer(proj [norm(embedding) | norm(hidden)])).

    The hidden input is the model's after its final norm, as inference engines feed the published weights.

    Args:
        blocks: the flags of the blocks.
        dim: D.
        layer: an ordinary decoder layer.
    """

    def __init__(self, blocks: BlocksConfig, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.embed_norm = build_norm(blocks, dim)
        self.hidden_norm = build_norm(blocks, dim)
        self.proj = nn.Linear(2 * dim, dim, bias=False)
        init_weights(self.proj, blocks.std)
        self.layer = layer
        self.norm = build_norm(blocks, dim)

    def forward(
        self,
        hidden_BSD: Tensor,
        embedded_BSD: Tensor,
        *,
        future_mask: Tensor,
        padding_BS: Tensor | None,
        tokens: TokenInfo,
    ) -> tuple[Tensor, MoEAux | None]:
        """Compute what the block makes of every position.

        Args:
            hidden_BSD: float, of each position.
            embedded_BSD: float, embedding of the token to come next.
            future_mask: see the decoder layer's ``self_attn_mask``.
            padding_BS: bool, True = padding.
            tokens: for the router.

        Returns:
            float (B, S, D), normalised, for the output projection and the next block; what the experts say.
        """
        joined = torch.cat([self.embed_norm(embedded_BSD), self.hidden_norm(hidden_BSD)], dim=-1)
        kwargs: dict[str, Any] = {} if getattr(self.layer, "moe_layer", None) is None else {"tokens": tokens}
        x, _, _, *aux = self.layer(
            self.proj(joined).transpose(0, 1),
            self_attn_mask=future_mask,
            self_attn_padding_mask=padding_BS,
            **kwargs,
        )
        found = MoEAux(losses=aux[0], histogram_34E=aux[1], measures_4=aux[2]) if aux else None
        return self.norm(x.transpose(0, 1)), found
