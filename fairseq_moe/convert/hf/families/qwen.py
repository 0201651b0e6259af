"""Read and write the config.json of Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes, grouped_heads, no_sliding_window
from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["QWEN2_MOE", "QWEN3_MOE"]


def _qwen(keys: ConfigKeys, **own: Any) -> ModelSpec:
    common = common_sizes(keys, max_positions=32768)
    no_sliding_window(keys)
    routing = Routing(
        num_experts=keys.integer("num_experts", "num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        normalized=keys.flag("norm_topk_prob", False),
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    step, dense = keys.integer("decoder_sparse_step", default=1), keys.integers("mlp_only_layers")
    moe_layers = tuple(
        index not in dense and (index + 1) % step == 0 for index in range(common["num_layers"])
    )
    dense_dim = keys.integer("intermediate_size")
    return ModelSpec(
        **common,
        **grouped_heads(keys, common),
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        dense_ffn_dim=None if all(moe_layers) else dense_dim,
        expert_ffn_dim=keys.integer("moe_intermediate_size"),
        moe_layers=moe_layers,
        routing=routing,
        **own,
    )


def _qwen2_moe(keys: ConfigKeys) -> ModelSpec:
    return _qwen(
        keys,
        attention_bias="qkv" if keys.flag("qkv_bias", True) else "none",
        shared_ffn_dim=keys.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _qwen3_moe(keys: ConfigKeys) -> ModelSpec:
    bias = keys.flag("attention_bias", False)
    return _qwen(keys, attention_bias="all" if bias else "none", qk_norm="head")


def _write(spec: ModelSpec, **own: Any) -> dict[str, Any]:
    return own | {
        "decoder_sparse_step": 1,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "mlp_only_layers": [index for index, is_moe in enumerate(spec.moe_layers) if not is_moe],
        "moe_intermediate_size": spec.expert_ffn_dim,
        "norm_topk_prob": spec.routing.normalized,
        "num_experts": spec.routing.num_experts,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "use_sliding_window": False,
    }


def _write_qwen2(spec: ModelSpec) -> dict[str, Any]:
    return _write(
        spec,
        architectures=["Qwen2MoeForCausalLM"],
        qkv_bias=spec.attention_bias == "qkv",
        shared_expert_intermediate_size=spec.shared_ffn_dim,
    )


def _write_qwen3(spec: ModelSpec) -> dict[str, Any]:
    return _write(spec, architectures=["Qwen3MoeForCausalLM"], attention_bias=spec.attention_bias == "all")


QWEN2_MOE = Family(
    read=_qwen2_moe,
    write=_write_qwen2,
    published=ExpertNames(shared="shared_expert."),
    num_experts_key="num_experts",
)
QWEN3_MOE = Family(read=_qwen3_moe, write=_write_qwen3, num_experts_key="num_experts")
