"""A run that goes on treats padding as it did before, whatever the default has become since."""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import open_dict

from fairseq_moe.models.decoder import MoEDecoder

__all__ = ["keep_padding_mask"]

logger = logging.getLogger(__name__)

_FLAG = "--use-moe-pad-mask"


def keep_padding_mask(decoder: MoEDecoder, model_cfg: Any, saved: Mapping[str, Any] | None) -> None:
    """Decide whether padding is routed, say so where it is not by default, and note it for the next checkpoint.

    Args:
        decoder: of the run.
        model_cfg: the run's model configuration, which its checkpoints will hold.
        saved: the model configuration of the run that is resumed; None for a run that begins.
    """
    given, trained_with = model_cfg.use_moe_pad_mask, (saved or {}).get("use_moe_pad_mask")
    if trained_with is not None and given is None:
        if trained_with != decoder.masks_padding:
            logger.info(
                "%s stays %s, as this run was trained so far; the default would be %s (give the flag to change it)",
                _FLAG,
                _word(trained_with),
                _word(decoder.masks_padding),
            )
        decoder.masks_padding = bool(trained_with)
    elif trained_with is not None and trained_with != given:
        logger.info(
            "%s %s was given; this run was trained so far with %s", _FLAG, _word(given), _word(trained_with)
        )
    with open_dict(model_cfg):
        model_cfg.use_moe_pad_mask = decoder.masks_padding


def _word(value: bool) -> str:
    return "true" if value else "false"
