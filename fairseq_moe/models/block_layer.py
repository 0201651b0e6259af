"""Build a decoder layer from the blocks that ``fairseq_moe.flags.blocks`` describes, with experts or without."""

from collections.abc import Callable
from typing import Any

import torch
from fairseq import utils
from fairseq.incremental_decoding_utils import FairseqIncrementalState
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.models.decoder_layer import expert_activation
from fairseq_moe.modules import MoELayer, Router, TokenInfo
from fairseq_moe.modules.blocks.attend import Cache, extended
from fairseq_moe.modules.blocks.grouped import GroupedAttention
from fairseq_moe.modules.blocks.latent import LatentAttention, LatentAttentionConfig
from fairseq_moe.modules.blocks.norm import RMSNorm
from fairseq_moe.modules.blocks.rope import Rotary
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.moe_layer import RoutingMemo

__all__ = ["BlocksDecoderLayer", "build_norm", "ffn_activation", "init_weights"]

IncrementalState = dict[str, dict[str, Tensor | None]]


class BlocksDecoderLayer(FairseqIncrementalState, nn.Module):
    """Compute x + attention(norm(x)), then x + network(norm(x)), where the network may be a layer of experts.

    Args:
        cfg: fairseq's structured transformer configuration.
        blocks: the flags of the blocks.
        rotary: turns heads, shared by all layers; None: nothing turns.
        moe_layer: experts in the place of the dense network.
    """

    # fairseq's mixin is untyped, and nn.Module would answer for what it brings.
    get_incremental_state: Callable[..., Any]
    set_incremental_state: Callable[..., None]

    def __init__(
        self,
        cfg: TransformerConfig,
        blocks: BlocksConfig,
        *,
        rotary: Rotary | None = None,
        moe_layer: MoELayer | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = cfg.decoder.embed_dim
        name = type(self).__name__
        self.dropout_module = FairseqDropout(cfg.dropout, module_name=name)
        self.activation_dropout_module = FairseqDropout(
            float(cfg.activation_dropout or cfg.relu_dropout or 0), module_name=name
        )
        attention = blocks.attention_config(
            model_dim=self.embed_dim,
            num_heads=cfg.decoder.attention_heads,
            dropout=cfg.attention_dropout,
        )
        self.self_attn: GroupedAttention | LatentAttention
        if isinstance(attention, LatentAttentionConfig):
            assert rotary is not None
            self.self_attn = LatentAttention(attention, rotary)
        else:
            self.self_attn = GroupedAttention(attention, rotary)
        self.self_attn_layer_norm = build_norm(blocks, self.embed_dim)
        self.final_layer_norm = build_norm(blocks, self.embed_dim)
        self.moe_layer = moe_layer
        if moe_layer is None:
            self.activation_fn = ffn_activation(cfg, blocks)
            hidden_dim = cfg.decoder.ffn_embed_dim
            rows = 2 * hidden_dim if blocks.gated_ffn else hidden_dim
            self.fc1 = nn.Linear(self.embed_dim, rows, bias=not blocks.gated_ffn)
            self.fc2 = nn.Linear(hidden_dim, self.embed_dim, bias=not blocks.gated_ffn)
        init_weights(self, blocks.std)

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
        *,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_attn: bool = False,
        need_head_weights: bool = False,
        tokens: TokenInfo | None = None,
        memo: RoutingMemo | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Run attention and the network, or the experts, over all positions.

        Args:
            x: float (S, B, D).
            encoder_out: unused, as are the encoder mask and the attention-weight switches; stock passes them.
            encoder_padding_mask: see above.
            incremental_state: keys and values of earlier tokens, or their latents.
            self_attn_mask: whether there is one tells that tokens do not see later ones; its values are not used.
            self_attn_padding_mask: bool (B, S), True = padding.
            need_attn: see above.
            need_head_weights: see above.
            tokens: what the router needs to know of the tokens, in batch-major order; None without experts.
            memo: routing of an earlier pass over the same input.

        Returns:
            output (S, B, D) and two Nones, as stock's layer; with experts also the three tensors of ``MoEAux``.
        """
        x_BSD = x.transpose(0, 1)
        attended = self._attend(x_BSD, incremental_state, self_attn_mask is not None, self_attn_padding_mask)
        x_BSD = x_BSD + self.dropout_module(attended)
        normed = self.final_layer_norm(x_BSD)
        if self.moe_layer is None:
            hidden = self.activation_dropout_module(self.activation_fn(self.fc1(normed)))
            x_BSD = x_BSD + self.dropout_module(self.fc2(hidden))
            return x_BSD.transpose(0, 1), None, None
        y_TD, aux = self.moe_layer(normed.reshape(-1, normed.shape[-1]), tokens=tokens, memo=memo)
        x_BSD = x_BSD + y_TD.view(x_BSD.shape)
        return x_BSD.transpose(0, 1), None, None, aux.losses, aux.stats, aux.load_2E

    def _attend(
        self,
        x_BSD: Tensor,
        incremental_state: IncrementalState | None,
        causal: bool,
        padding_BS: Tensor | None,
    ) -> Tensor:
        cache: Cache | None = None
        if incremental_state is not None:
            cache = self.get_incremental_state(incremental_state, "attention") or {}
            padding_BS = _remembered(cache, padding_BS, x_BSD)
        attended: Tensor = self.self_attn(
            self.self_attn_layer_norm(x_BSD),
            causal=causal or incremental_state is not None,
            padding_BT=padding_BS,
            cache=cache,
        )
        if cache is not None:
            self.set_incremental_state(incremental_state, "attention", cache)
        return attended

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> None:
        """Let beam search choose among the sequences: ``new_order`` is int64 (B',)."""
        cache = self.get_incremental_state(incremental_state, "attention")
        if cache is not None:
            chosen = {name: value.index_select(0, new_order) for name, value in cache.items()}
            self.set_incremental_state(incremental_state, "attention", chosen)


def _remembered(cache: Cache, padding_BS: Tensor | None, x_BSD: Tensor) -> Tensor:
    """Join the padding of earlier and new tokens, and keep both in the cache."""
    if padding_BS is None:
        padding_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    return extended(cache, "padding", padding_BS, dim=1)


def build_norm(blocks: BlocksConfig, dim: int) -> nn.Module:
    """Build the norm that the flags ask for, RMSNorm or LayerNorm."""
    if blocks.decoder_normalization == "rmsnorm":
        return RMSNorm(dim, eps=blocks.eps)
    return nn.LayerNorm(dim, eps=blocks.eps)


def ffn_activation(cfg: TransformerConfig, blocks: BlocksConfig) -> Any:
    """Choose the activation between the matrices of dense networks and experts."""
    if blocks.gated_ffn:
        return swiglu
    return expert_activation(utils.get_activation_fn(cfg.activation_fn))


def init_weights(module: nn.Module, std: float) -> None:
    """Draw normal weights and zero biases for linear maps, routers and embeddings inside; experts start themselves."""
    for part in module.modules():
        is_cosine = isinstance(part, Router) and part.scorer.cosine
        if isinstance(part, nn.Linear | nn.Embedding | Router) and not is_cosine:
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
