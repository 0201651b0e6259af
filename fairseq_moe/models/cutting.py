"""Cut whole parameters into the parts of tensor ranks, once a layer has been built from the common generator.

So initial weights do not depend on the layout. What is not listed here is whole on every rank; where each rank shows it
other tokens, or other heads, a gradient is the sum of all ranks', as ``parallel.placement`` says.
"""

from collections.abc import Iterator

from torch import nn

from fairseq_moe.distributed.joining import cut_part
from fairseq_moe.distributed.mesh import ParallelMesh
from fairseq_moe.errors import ConfigError
from fairseq_moe.models.block_layer import BlocksDecoderLayer
from fairseq_moe.modules.blocks.grouped import GroupedAttention
from fairseq_moe.modules.kernels.swiglu import is_gated
from fairseq_moe.parallel.placement import (
    TENSOR_COLUMNS,
    TENSOR_GATED_ROWS,
    TENSOR_ROWS,
    Placement,
    place,
    vocabulary_placement,
)

__all__ = ["cut_layer", "cut_vocabulary"]

# Of attention, grouped or latent: projections whose outputs are heads.
_BY_HEAD = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")
_Placed = tuple[nn.Module, str, Placement]


def cut_layer(layer: BlocksDecoderLayer, mesh: ParallelMesh) -> BlocksDecoderLayer:
    """Keep this rank's heads and widths of a layer, in place."""
    for module, name, placement in (*_attention_parts(layer.self_attn), *_network_parts(layer)):
        _cut(module, name, placement, mesh)
    return layer


def cut_vocabulary(embedding: nn.Embedding, projection: nn.Linear, mesh: ParallelMesh) -> None:
    """Keep this rank's words of the embedding and of the output projection, in place; tied ones stay tied.

    Raises:
        ConfigError: there are fewer words than ranks.
    """
    num_words, num_ranks = len(projection.weight), mesh.ranks.tensor
    if num_words < num_ranks:
        raise ConfigError(
            [
                f"--tensor-model-parallel-size is {num_ranks}, but the dictionary has {num_words} words, of which each "
                "rank needs at least one; lower it."
            ]
        )
    is_tied = projection.weight is embedding.weight
    _cut(embedding, "weight", vocabulary_placement(len(embedding.weight)), mesh)
    if is_tied:
        projection.weight = embedding.weight
    else:
        _cut(projection, "weight", vocabulary_placement(len(projection.weight)), mesh)


def _attention_parts(attention: nn.Module) -> Iterator[_Placed]:
    for name, module in attention.named_children():
        if name in _BY_HEAD:
            yield module, "weight", TENSOR_ROWS
            yield module, "bias", TENSOR_ROWS
    yield attention.get_submodule("out_proj"), "weight", TENSOR_COLUMNS
    if isinstance(attention, GroupedAttention):
        yield attention, "sinks", TENSOR_ROWS
    if isinstance(attention, GroupedAttention) and attention.config.qk_norm == "full":
        yield attention.q_norm, "weight", TENSOR_ROWS
        yield attention.k_norm, "weight", TENSOR_ROWS


def _network_parts(layer: BlocksDecoderLayer) -> Iterator[_Placed]:
    if layer.moe_layer is not None:
        return
    rows = TENSOR_GATED_ROWS if is_gated(layer.activation_fn) else TENSOR_ROWS
    yield layer.fc1, "weight", rows
    yield layer.fc1, "bias", rows
    yield layer.fc2, "weight", TENSOR_COLUMNS


def _cut(module: nn.Module, name: str, placement: Placement, mesh: ParallelMesh) -> None:
    whole = getattr(module, name)
    if whole is None:
        return
    part = nn.Parameter(cut_part(whole.detach(), placement, mesh), requires_grad=whole.requires_grad)
    place([part], placement)
    setattr(module, name, part)
