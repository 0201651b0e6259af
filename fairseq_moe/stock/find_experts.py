"""Finding the experts inside whatever fairseq has wrapped around them, and what a wrapper has done to parameters."""

from collections.abc import Iterable

from torch import Tensor, nn

from fairseq_moe.models.decoder import MoEDecoder

__all__ = ["any_flattened", "moe_decoder"]


def moe_decoder(module: nn.Module) -> MoEDecoder | None:
    """Find the decoder with experts inside ``module`` (a model, or one wrapped by DDP or FSDP), or None."""
    for child in module.modules():
        if isinstance(child, MoEDecoder):
            return child if child.moe.enabled else None
    return None


def any_flattened(parameters: Iterable[Tensor]) -> bool:
    """Tell whether fairscale's FSDP holds any of these parameters, several tensors end to end in each."""
    return any(hasattr(parameter, "_is_sharded") for parameter in parameters)
