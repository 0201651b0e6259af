"""The complete configuration that fairseq keeps in a checkpoint, for a model that no training has made."""

from typing import Any

from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf

from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModelConfig

__all__ = ["complete_settings"]


def complete_settings(flags: dict[str, Any], *, max_positions: int) -> dict[str, Any]:
    """Plain values of every section.

    Args:
        flags: of the model.
        max_positions: longest sequence.
    """
    cfg = OmegaConf.structured(FairseqConfig)
    OmegaConf.set_struct(cfg, False)
    cfg.task = OmegaConf.structured(
        LanguageModelingConfig(tokens_per_sample=max_positions, max_target_positions=max_positions)
    )
    cfg.model = OmegaConf.structured(MoETransformerLanguageModelConfig(**flags))
    cfg.task._name, cfg.model._name = "language_modeling", "transformer_lm"
    found: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    return found
