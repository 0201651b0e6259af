"""List the families, by transformers' ``model_type``; where several have a model, it is written as the first."""

from fairseq_moe.convert.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from fairseq_moe.convert.hf.families.dots import DOTS1
from fairseq_moe.convert.hf.families.ernie import ERNIE4_5_MOE
from fairseq_moe.convert.hf.families.family import Family
from fairseq_moe.convert.hf.families.glm import GLM4_MOE, GLM4_MOE_LITE
from fairseq_moe.convert.hf.families.gpt_oss import GPT_OSS
from fairseq_moe.convert.hf.families.granite import GRANITE_MOE, GRANITE_MOE_SHARED
from fairseq_moe.convert.hf.families.hunyuan import HUNYUAN_V1_MOE
from fairseq_moe.convert.hf.families.minimax import MINIMAX_M2
from fairseq_moe.convert.hf.families.mixtral import MIXTRAL
from fairseq_moe.convert.hf.families.olmoe import OLMOE
from fairseq_moe.convert.hf.families.qwen import QWEN2_MOE, QWEN3_MOE

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Family] = {
    "mixtral": MIXTRAL,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "qwen2_moe": QWEN2_MOE,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
    "dots1": DOTS1,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "minimax_m2": MINIMAX_M2,
    "kimi_k2": KIMI_K2,
    "gpt_oss": GPT_OSS,
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE_SHARED,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "ernie4_5_moe": ERNIE4_5_MOE,
}
