"""Read and write the config.json of OLMoE (Muennighoff et al. 2024, arXiv 2409.02060)."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes, grouped_heads
from fairseq_moe.convert.hf.families.family import Family
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["OLMOE"]


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=4096)
    routing = Routing(
        num_experts=keys.integer("num_experts", "num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        normalized=keys.flag("norm_topk_prob", False),
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    return ModelSpec(
        **common,
        **grouped_heads(keys, common, if_null=True, if_absent=True),
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        qk_norm="full",
        clip_qkv=keys.number("clip_qkv", None, positive=True),
        norm_eps=keys.number("rms_norm_eps", 1e-5, positive=True),
        expert_ffn_dim=keys.integer("intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        routing=routing,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": spec.attention_bias == "all",
        "clip_qkv": spec.clip_qkv,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "norm_topk_prob": spec.routing.normalized,
        "num_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
    }


OLMOE = Family(read=_read, write=_write, num_experts_key="num_experts")
