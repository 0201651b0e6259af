"""Count the parameters of a model, and those of them that a token passes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fairseq_moe.distributed import ParallelMesh
from fairseq_moe.distributed.joining import whole_numel
from fairseq_moe.parallel.placement import is_expert, is_second_end, placement_of

__all__ = ["ModelSize", "counted_here", "model_size", "true_size", "whole_size"]

_P = TypeVar("_P", bound=Tensor)


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Hold the numbers of parameters of a whole model, on all ranks; buffers do not count.

    Args:
        total: all, without multi-token prediction.
        active: those that one token passes: K of E experts of each layer.
        active_without_embedding: without the rows of the input embedding, unless it is also the output projection.
        mtp: of the blocks for multi-token prediction.
    """

    total: int
    active: int
    active_without_embedding: int
    mtp: int

    def __str__(self) -> str:
        """Print the numbers as the start of a run logs them."""
        text = (
            f"model params: {self.total:,} (per token: {self.active:,}; without input embedding: "
            f"{self.active_without_embedding:,})"
        )
        return text + (f", and {self.mtp:,} for multi-token prediction" if self.mtp else "")


def model_size(decoder: Any) -> ModelSize:
    """Count the parameters of a whole model from those of one rank; of a pipeline, those of its stage.

    Args:
        decoder: a ``MoEDecoder``, before FSDP wraps it as a whole; its layers may be wrapped already.
    """
    num_experts, top_k = decoder.moe.num_experts or 1, decoder.moe.top_k
    num_local = 1 if decoder.mesh is None else len(decoder.mesh.layout.local_ids(decoder.mesh.rank))
    blocks = getattr(decoder, "mtp", None)  # of the last stage
    of_mtp = set() if blocks is None else {id(parameter) for parameter in blocks.parameters()}
    total = active = mtp = 0
    for parameter in counted_here(decoder.parameters(), decoder.mesh):
        size = whole_size(parameter, decoder.mesh)
        if is_expert(parameter):
            size = size // num_local * num_experts
        if id(parameter) in of_mtp:
            mtp += size
            continue
        total += size
        active += size // num_experts * top_k if is_expert(parameter) else size
    embedding = 0
    if decoder.stage.is_first and not decoder.share_input_output_embed:
        embedding = whole_size(decoder.embed_tokens.weight, decoder.mesh)
    return ModelSize(total=total, active=active, active_without_embedding=active - embedding, mtp=mtp)


def counted_here(parameters: Iterable[_P], mesh: ParallelMesh | None) -> Iterator[_P]:
    """List the parameters of a rank without those that the first stage of its pipeline holds and counts as well."""
    for parameter in parameters:
        if mesh is None or not is_second_end(placement_of(parameter), mesh.ranks, mesh.rank):
            yield parameter


def whole_size(parameter: Tensor, mesh: ParallelMesh | None) -> int:
    """Count the elements of a parameter with the parts that other ranks hold of it; of experts, this rank's own.

    Args:
        parameter: of a model.
        mesh: over which it is spread; None: it is not.
    """
    size = true_size(parameter)
    return size if mesh is None else whole_numel(size, placement_of(parameter), mesh)


def true_size(parameter: Tensor) -> int:
    """Count the elements of the whole tensor, which FSDP notes on its shard."""
    size = getattr(parameter, "_orig_size", None)
    return parameter.numel() if size is None else int(size.numel())
