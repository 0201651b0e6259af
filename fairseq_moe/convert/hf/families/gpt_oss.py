"""Read and write the config.json of gpt-oss (OpenAI 2025, arXiv 2508.10925)."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes, grouped_heads
from fairseq_moe.convert.hf.families.family import FUSED, ExpertNames, Family
from fairseq_moe.convert.hf.families.windows import layer_types, window_of, windows
from fairseq_moe.convert.hf.layout import Layout
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["GPT_OSS"]


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=131072)
    num_layers = common["num_layers"]
    if not any(keys.values.get(name) for name in ("rope_scaling", "rope_parameters")):
        keys.problems.append(
            f"{keys.source} has no rope_scaling, for which transformers takes the YaRN of gpt-oss-20b, and other "
            "programs none; expected the settings, or rope_type default."
        )
    alternating = [index % 2 == 0 for index in range(num_layers)]
    routing = Routing(
        num_experts=keys.integer("num_local_experts", "num_experts"),
        top_k=keys.integer("num_experts_per_tok", "experts_per_token"),
        normalized=True,
        logits_bias=True,
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    return ModelSpec(
        **common,
        **grouped_heads(keys, common, if_null=True, head_dim=64),
        **windows(keys, window_of(keys, absent=128), num_layers=num_layers, default=alternating),
        attention_bias="all" if keys.flag("attention_bias", True) else "none",
        sinks=True,
        norm_eps=keys.number("rms_norm_eps", 1e-5, positive=True),
        ffn_bias=True,
        swiglu_limit=keys.number("swiglu_limit", 7.0, positive=True),
        swiglu_alpha=keys.number("swiglu_alpha", 1.702, positive=True),
        expert_ffn_dim=keys.integer("intermediate_size"),
        moe_layers=(True,) * num_layers,
        routing=routing,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": spec.attention_bias == "all",
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "layer_types": layer_types(spec),
        "num_local_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "sliding_window": spec.window,
        "swiglu_alpha": spec.swiglu_alpha,
        "swiglu_limit": spec.swiglu_limit,
    }


GPT_OSS = Family(
    read=_read,
    write=_write,
    published=ExpertNames(router="router.weight", router_bias="router.bias", stacked=FUSED),
    gate_up=Layout(transposed=True, interleaved=True),
    down=Layout(transposed=True),
    num_experts_key="num_local_experts",
)
