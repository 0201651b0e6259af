"""Published settings of the newer families: transformers builds as many parameters of them as our preset has.

Run with ``pytest tests/numerics/test_published_sizes.py``. The models are built on the meta device.
"""

import copy

import pytest
import torch

from fairseq_moe.convert.hf.families import FAMILIES
from fairseq_moe.models.presets import PRESETS
from tests.helpers.hf import import_transformers
from tests.helpers.published_configs import PUBLISHED

PRESET_OF = {
    "glm4_moe": "glm_4_5",
    "glm4_moe_air": "glm_4_5_air",
    "glm4_moe_lite": "glm_4_7_flash",
    "dots1": "dots_llm1",
    "minimax_m2": "minimax_m2",
    "kimi_k2": "kimi_k2",
}


@pytest.mark.parametrize("name", PRESET_OF)
def test_transformers_builds_as_many_parameters(name: str) -> None:
    transformers = import_transformers()
    values = copy.deepcopy(PUBLISHED[name][0])
    kind = str(values.pop("model_type"))
    given = {key: value for key, value in values.items() if key not in ("auto_map", "quantization_config")}
    config = transformers.AutoConfig.for_model(FAMILIES[kind].runs_as or kind, **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == PRESETS[PRESET_OF[name]].num_parameters
    )
