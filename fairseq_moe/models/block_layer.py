"""Build a decoder layer from the blocks that ``fairseq_moe.flags.blocks`` describes, with experts or without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.incremental_decoding_utils import FairseqIncrementalState
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.models.decoder_layer import expert_activation
from fairseq_moe.modules import MoEAux, MoELayer, Router, TokenInfo
from fairseq_moe.modules.blocks.attend import Cache, extended
from fairseq_moe.modules.blocks.grouped import GroupedAttention
from fairseq_moe.modules.blocks.latent import LatentAttention, LatentAttentionConfig
from fairseq_moe.modules.blocks.norm import RMSNorm
from fairseq_moe.modules.blocks.rope import Rotary
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.modules.shards import LocalShards, Shards

__all__ = [
    "BlocksDecoderLayer",
    "DenseNetwork",
    "build_blocks_layer",
    "build_norm",
    "ffn_activation",
    "init_weights",
]

IncrementalState = dict[str, dict[str, Tensor | None]]


class BlocksDecoderLayer(FairseqIncrementalState, nn.Module):
    """Compute x + attention(norm(x)), then x + network(norm(x)), where the network may be a layer of experts.

    On one of several ranks of a micro-batch the layer takes and gives that rank's own tokens.

    Args:
        attention: heads that look at earlier tokens.
        attention_norm: before it.
        network_norm: before the network.
        network: the experts; or ``fc1``, activation and ``fc2`` of a dense network.
        dropout: probability, on what attention and the dense network add.
        activation_dropout: probability, after the dense network's activation.
        multiplier: of what attention and the network add.
        shards: the ranks of a micro-batch.
    """

    # fairseq's mixin is untyped, and nn.Module would answer for what it brings.
    get_incremental_state: Callable[..., Any]
    set_incremental_state: Callable[..., None]

    def __init__(
        self,
        *,
        attention: GroupedAttention | LatentAttention,
        attention_norm: nn.Module,
        network_norm: nn.Module,
        network: "MoELayer | DenseNetwork",
        dropout: float,
        activation_dropout: float,
        multiplier: float = 1.0,
        shards: Shards,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.dropout_module = FairseqDropout(dropout, module_name=name)
        self.activation_dropout_module = FairseqDropout(activation_dropout, module_name=name)
        self.self_attn = attention
        self.self_attn_layer_norm = attention_norm
        self.final_layer_norm = network_norm
        self.moe_layer = network if isinstance(network, MoELayer) else None
        if isinstance(network, DenseNetwork):
            self.activation_fn, self.fc1, self.fc2 = network.activation, network.fc1, network.fc2
        self.multiplier = multiplier
        self.shards = shards

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
            x: float (S, B, D), of this rank's own positions.
            encoder_out: unused, as are the encoder mask and the attention-weight switches; stock passes them.
            encoder_padding_mask: see above.
            incremental_state: keys and values of earlier tokens, or their latents.
            self_attn_mask: whether there is one tells that tokens do not see later ones; its values are not used.
            self_attn_padding_mask: bool (B, S), True = padding, of all ranks' positions.
            need_attn: see above.
            need_head_weights: see above.
            tokens: what the router needs to know of the tokens, in batch-major order; None without experts. Of
                positions that are absent (see ``modules.shards``) there is none.
            memo: routing of an earlier pass over the same input.

        Returns:
            output (S, B, D) and two Nones, as stock's layer; with experts also the three tensors of ``MoEAux``.
        """
        x_BSD = x.transpose(0, 1)
        attended = self._attend(x_BSD, incremental_state, self_attn_mask is not None, self_attn_padding_mask)
        x_BSD = self._added(x_BSD, self.dropout_module(attended))
        normed = self.final_layer_norm(x_BSD)
        if self.moe_layer is None:
            gathered = self.shards.gather(normed)
            hidden = self.activation_dropout_module(self.activation_fn(self.fc1(gathered)))
            x_BSD = self._added(x_BSD, self.dropout_module(self.shards.project_back(self.fc2, hidden)))
            return x_BSD.transpose(0, 1), None, None
        assert tokens is not None
        y_BSD, aux = self._mix(self.moe_layer, normed, tokens, memo)
        x_BSD = self._added(x_BSD, y_BSD)
        return x_BSD.transpose(0, 1), None, None, aux.losses, aux.histogram_34E, aux.measures_4

    def _added(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        return x_BSD + y_BSD if self.multiplier == 1.0 else torch.add(x_BSD, y_BSD, alpha=self.multiplier)

    @staticmethod
    def _mix(
        moe_layer: MoELayer, x_BSD: Tensor, tokens: TokenInfo, memo: RoutingMemo | None
    ) -> tuple[Tensor, MoEAux]:
        """Let experts compute the positions that are there; absent ones, at the end, get zeros."""
        batch, length, dim = x_BSD.shape
        present = length if tokens.num_positions is None else tokens.num_positions
        y_TD, aux = moe_layer(x_BSD[:, :present].reshape(-1, dim), tokens=tokens, memo=memo)
        y_BSD = y_TD.view(batch, present, dim)
        return y_BSD if present == length else F.pad(y_BSD, (0, 0, 0, length - present)), aux

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


@dataclass(frozen=True, kw_only=True)
class DenseNetwork:
    """Hold the parts of a feed-forward network: fc2(activation(fc1(x)))."""

    fc1: nn.Linear
    activation: Callable[[Tensor], Tensor]
    fc2: nn.Linear


def build_blocks_layer(
    cfg: TransformerConfig,
    blocks: BlocksConfig,
    *,
    rotary: Rotary | None = None,
    moe_layer: MoELayer | None = None,
    shards: Shards | None = None,
    window: int | None = None,
) -> BlocksDecoderLayer:
    """Build a layer whole, with new weights.

    Args:
        cfg: fairseq's structured transformer configuration.
        blocks: the flags of the blocks.
        rotary: turns heads, shared by all layers; None: nothing turns.
        moe_layer: experts in the place of the dense network.
        shards: the ranks of a micro-batch; None: this one alone.
        window: tokens that a query sees, itself included; None: all earlier ones.
    """
    shards = shards or LocalShards()
    dim, hidden_dim = cfg.decoder.embed_dim, cfg.decoder.ffn_embed_dim
    config = blocks.attention_config(
        model_dim=dim, num_heads=cfg.decoder.attention_heads, dropout=cfg.attention_dropout, window=window
    )
    attention: GroupedAttention | LatentAttention
    if isinstance(config, LatentAttentionConfig):
        assert rotary is not None
        attention = LatentAttention(config, rotary, shards)
    else:
        attention = GroupedAttention(config, rotary, shards)
    attention_norm, network_norm = build_norm(blocks, dim), build_norm(blocks, dim)
    network: MoELayer | DenseNetwork | None = moe_layer
    if network is None:
        rows = 2 * hidden_dim if blocks.gated_ffn else hidden_dim
        has_bias = blocks.gated_ffn_bias or not blocks.gated_ffn
        network = DenseNetwork(
            fc1=nn.Linear(dim, rows, bias=has_bias),
            activation=ffn_activation(cfg, blocks),
            fc2=nn.Linear(hidden_dim, dim, bias=has_bias),
        )
    layer = BlocksDecoderLayer(
        attention=attention,
        attention_norm=attention_norm,
        network_norm=network_norm,
        network=network,
        dropout=cfg.dropout,
        activation_dropout=float(cfg.activation_dropout or cfg.relu_dropout or 0),
        multiplier=1.0 if blocks.residual_multiplier is None else blocks.residual_multiplier,
        shards=shards,
    )
    init_weights(layer, blocks.std)
    return layer


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
        return blocks.gated_activation()
    return expert_activation(utils.get_activation_fn(cfg.activation_fn))


def init_weights(module: nn.Module, std: float) -> None:
    """Draw normal weights, sinks and zero biases for what is inside; experts start themselves.

    A router's bias is drawn like its weights, as gpt-oss's is.
    """
    for part in module.modules():
        is_cosine = isinstance(part, Router) and part.scorer.cosine
        if isinstance(part, nn.Linear | nn.Embedding | Router) and not is_cosine:
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, Router) and part.bias is not None:
            nn.init.normal_(part.bias, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, GroupedAttention) and part.sinks is not None:
            nn.init.normal_(part.sinks, std=std)
