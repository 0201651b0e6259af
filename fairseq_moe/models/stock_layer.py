"""Rebuild stock's decoder layer, pre-norm, from our own blocks, which know the ranks of a micro-batch.

Stock's layer is built first, by stock, so that names, initial values and random numbers drawn are its own.
"""

from typing import Any

import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase

from fairseq_moe.distributed import ParallelMesh
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.models.block_layer import BlocksDecoderLayer, DenseNetwork
from fairseq_moe.models.cutting import cut_layer
from fairseq_moe.models.decoder_layer import MoEDecoderLayer
from fairseq_moe.modules.blocks.grouped import GroupedAttention, GroupedAttentionConfig
from fairseq_moe.modules.shards import Shards

__all__ = ["build_stock_layer_part"]


def build_stock_layer_part(
    cfg: TransformerConfig, moe: MoEConfig | None, mesh: ParallelMesh, shards: Shards
) -> BlocksDecoderLayer:
    """Build stock's layer, whole, and keep this rank's part of it as one of our blocks.

    Args:
        cfg: fairseq's structured transformer configuration.
        moe: the expert flags; None: the layer is dense.
        mesh: process groups.
        shards: the ranks of a micro-batch.
    """
    layer = TransformerDecoderLayerBase(cfg, True) if moe is None else MoEDecoderLayer(cfg, moe, mesh)
    return cut_layer(_rebuilt(layer, cfg, shards), mesh)


def _rebuilt(layer: Any, cfg: TransformerConfig, shards: Shards) -> BlocksDecoderLayer:
    """Make a layer of our blocks out of the modules of stock's.

    Args:
        layer: stock's, or a ``MoEDecoderLayer``, with its norms before attention and network.
        cfg: what it was built from.
        shards: the ranks of a micro-batch.
    """
    num_heads = layer.self_attn.num_heads
    config = GroupedAttentionConfig(
        model_dim=layer.embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=layer.embed_dim // num_heads,
        bias="all",
        dropout=cfg.attention_dropout,
        padded_see_themselves=False,
    )
    with torch.device("meta"):  # stock's projections take the place of these
        attention = GroupedAttention(config, None, shards)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(attention, name, getattr(layer.self_attn, name))
    network = (
        layer.moe_layer
        if isinstance(layer, MoEDecoderLayer)
        else DenseNetwork(fc1=layer.fc1, activation=layer.activation_fn, fc2=layer.fc2)
    )
    return BlocksDecoderLayer(
        attention=attention,
        attention_norm=layer.self_attn_layer_norm,
        network_norm=layer.final_layer_norm,
        network=network,
        dropout=layer.dropout_module.p,
        activation_dropout=layer.activation_dropout_module.p,
        shards=shards,
    )
