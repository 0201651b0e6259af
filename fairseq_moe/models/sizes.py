"""Count the parameters of a model, and those of them that a token passes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairseq_moe.parallel.placement import is_expert

__all__ = ["ModelSize", "model_size", "true_size"]


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
    """Count the parameters of a whole model from those of one rank.

    Args:
        decoder: a ``MoEDecoder``, before FSDP wraps it as a whole; its layers may be wrapped already.
    """
    num_experts, top_k = decoder.moe.num_experts or 1, decoder.moe.top_k
    num_local = 1 if decoder.mesh is None else len(decoder.mesh.layout.local_ids(decoder.mesh.rank))
    of_mtp = {id(parameter) for parameter in decoder.mtp.parameters()} if decoder.blocks.mtp_layers else set()
    total = active = mtp = 0
    for parameter in decoder.parameters():
        size = true_size(parameter)
        if is_expert(parameter):
            size = size // num_local * num_experts
        if id(parameter) in of_mtp:
            mtp += size
            continue
        total += size
        active += size // num_experts * top_k if is_expert(parameter) else size
    embedding = 0 if decoder.share_input_output_embed else decoder.embed_tokens.weight.numel()
    return ModelSize(total=total, active=active, active_without_embedding=active - embedding, mtp=mtp)


def true_size(parameter: Tensor) -> int:
    """Count the elements of the whole tensor, which FSDP notes on its shard."""
    size = getattr(parameter, "_orig_size", None)
    return parameter.numel() if size is None else int(size.numel())
