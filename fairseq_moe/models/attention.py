"""Attend through torch's fused causal kernel (--fused-attention), with stock's parameters."""

from typing import Any

import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

__all__ = ["FusedSelfAttention", "fuse_attention"]


class FusedSelfAttention(MultiheadAttention):
    """Attend as fairseq's decoder does to itself, knowing that the mask is the causal one.

    Stock's hands the mask to the kernel as numbers, so the masked half is computed and thrown away.
    Parameters, their names and their initial values are stock's. Padding, incremental decoding and attention
    weights take stock's path.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Let each position attend to itself and the earlier ones.

        Args:
            query: float (S, B, D).
            key: the query itself.
            value: the query itself.
            key_padding_mask: bool (B, S), True = padding.
            incremental_state: keys and values of earlier tokens.
            need_weights: return attention weights too.
            static_kv: as stock.
            attn_mask: the decoder's future mask, whose values are taken for granted; None: all see all.
            before_softmax: as stock.
            need_head_weights: as stock.

        Returns:
            float (S, B, D), and None or the weights.
        """
        special = need_weights or need_head_weights or before_softmax or static_kv
        if special or key_padding_mask is not None or incremental_state is not None:
            output: tuple[Tensor, Tensor | None] = super().forward(
                query, key, value, key_padding_mask, incremental_state, need_weights, static_kv, attn_mask,
                before_softmax, need_head_weights,
            )  # fmt: skip
            return output
        seq_len, batch, _ = query.shape

        def by_head(projection: Any) -> Tensor:
            return projection(query).view(seq_len, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

        dropping = self.training or self.dropout_module.apply_during_inference
        y_BHSd = F.scaled_dot_product_attention(
            by_head(self.q_proj),
            by_head(self.k_proj),
            by_head(self.v_proj),
            dropout_p=self.dropout_module.p if dropping else 0.0,
            is_causal=attn_mask is not None,
        )
        y = y_BHSd.permute(2, 0, 1, 3).reshape(seq_len, batch, -1)
        return self.out_proj(y), None


def fuse_attention(model: nn.Module) -> None:
    """Give every self-attention of a decoder-only ``model`` the fused forward pass, in place.

    Only the class changes: parameters stay where they are, also where FSDP has flattened them already.
    """
    for module in model.modules():
        if type(module) is MultiheadAttention and module.self_attention:
            module.__class__ = FusedSelfAttention
