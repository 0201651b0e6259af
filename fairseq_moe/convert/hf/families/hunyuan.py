"""Read and write the config.json of Hunyuan-A13B (Tencent 2025)."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes
from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["HUNYUAN_V1_MOE"]


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=2048)
    heads, layers = common["num_heads"], common["num_layers"]
    head_dim = keys.integer("head_dim", "attention_head_dim")
    width = keys.integer("intermediate_size")
    keys.fixed(
        "moe_intermediate_size", width, [width] * layers, why="transformers gives experts intermediate_size"
    )
    keys.fixed("num_shared_expert", 1, [1] * layers, why="transformers gives every layer one shared expert")
    keys.fixed("use_mixed_mlp_moe", True, why="transformers gives every layer one shared expert")
    keys.fixed("use_qk_norm", True, why="transformers always normalises the heads of this family")
    keys.fixed("use_cla", False, why="layers here share no keys and values")
    routing = Routing(
        num_experts=keys.integer("num_experts", "num_local_experts"),
        top_k=keys.per_layer_integer("moe_topk", "num_experts_per_tok", num_layers=layers),
        normalized=True,
    )
    return ModelSpec(
        **common,
        num_kv_heads=keys.integer("num_key_value_heads", default=heads, null=True),
        head_dim=head_dim,
        rope=keys.rope(interleaved=False, alpha_dim=head_dim),
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        qk_norm="head",
        qk_norm_after_rope=True,
        norm_eps=keys.number("rms_norm_eps", 1e-5, positive=True),
        expert_ffn_dim=width,
        shared_ffn_dim=width,
        moe_layers=(True,) * layers,
        routing=routing,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "attention_bias": spec.attention_bias == "all",
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "moe_topk": spec.routing.top_k,
        "num_experts": spec.routing.num_experts,
    }


HUNYUAN_V1_MOE = Family(
    read=_read,
    write=_write,
    routes_in_float32=True,
    published=ExpertNames(router="gate.wg.weight", shared="shared_mlp."),
    head_norms=("query_layernorm", "key_layernorm"),
    num_experts_key="num_experts",
)
