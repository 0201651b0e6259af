"""Which published mixture-of-experts models are architectures: ``--arch mixtral_8x7b``, hydra's ``model=mixtral_8x7b``?

Sizes and rules are those of the published checkpoints, coefficients and initial deviations those of Megatron's
recipes. Any flag given by hand counts instead. The vocabulary is the dictionary's.

Tests: tests/unit/models/test_presets.py, tests/numerics/test_published_sizes.py.
"""

from collections.abc import Callable
from typing import Any

from fairseq.models import ARCH_MODEL_REGISTRY, register_model_architecture

from fairseq_moe.models.presets.first import FIRST_PRESETS
from fairseq_moe.models.presets.gpt_oss import GPT_OSS_PRESETS
from fairseq_moe.models.presets.preset import Preset
from fairseq_moe.models.presets.sigmoid import SIGMOID_PRESETS
from fairseq_moe.models.presets.small import SMALL_PRESETS

__all__ = ["PRESETS", "Preset", "register_presets"]

PRESETS: dict[str, Preset] = FIRST_PRESETS | GPT_OSS_PRESETS | SIGMOID_PRESETS | SMALL_PRESETS


def register_presets(store: Callable[[str, dict[str, Any]], None]) -> None:
    """Register every preset as an architecture of ``transformer_lm``.

    Args:
        store: also told the name of each and its flags, for hydra.
    """
    for name, preset in PRESETS.items():
        if name not in ARCH_MODEL_REGISTRY:  # the package may be imported again
            register_model_architecture("transformer_lm", name)(preset.apply_to_command)
        store(name, preset.values())
