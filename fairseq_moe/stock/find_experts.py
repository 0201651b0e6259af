"""Finding the experts inside whatever fairseq has wrapped around them."""

from torch import nn

from fairseq_moe.models.decoder import MoEDecoder

__all__ = ["moe_decoder"]


def moe_decoder(module: nn.Module) -> MoEDecoder | None:
    """The decoder with experts inside ``module`` (a model, or one wrapped by DDP or FSDP), or None."""
    for child in module.modules():
        if isinstance(child, MoEDecoder):
            return child if child.moe.enabled else None
    return None
