"""Read and write the config.json of Granite's models with experts (IBM), without and with a shared expert."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes, grouped_heads
from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["GRANITE_MOE", "GRANITE_MOE_SHARED"]


def _granite(keys: ConfigKeys, **own: Any) -> ModelSpec:
    common = common_sizes(keys, max_positions=2048)
    heads = grouped_heads(keys, common, if_null=True, if_absent=True)
    multiplier = keys.number("attention_multiplier", 1.0, positive=True)
    is_usual = multiplier == (heads["head_dim"] or 1) ** -0.5
    return ModelSpec(
        **common,
        **heads,
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        embedding_multiplier=keys.number("embedding_multiplier", 1.0, positive=True),
        residual_multiplier=keys.number("residual_multiplier", 1.0, positive=True),
        attention_multiplier=None if is_usual else multiplier,
        logits_scaling=keys.number("logits_scaling", 1.0, positive=True),
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        expert_ffn_dim=keys.integer("intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        routing=Routing(
            num_experts=keys.integer("num_local_experts"),
            top_k=keys.integer("num_experts_per_tok"),
            normalized=True,
            aux_loss_coeff=keys.number("router_aux_loss_coef", 0.001, null=True),
        ),
        **own,
    )


def _read_shared(keys: ConfigKeys) -> ModelSpec:
    return _granite(keys, shared_ffn_dim=keys.integer("shared_intermediate_size", default=0, least=0) or None)


def _write(spec: ModelSpec) -> dict[str, Any]:
    multiplier = spec.attention_multiplier
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "attention_bias": spec.attention_bias == "all",
        "attention_multiplier": spec.head_dim**-0.5 if multiplier is None else multiplier,
        "embedding_multiplier": spec.embedding_multiplier,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.expert_ffn_dim,
        "logits_scaling": spec.logits_scaling,
        "num_local_experts": spec.routing.num_experts,
        "residual_multiplier": spec.residual_multiplier,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
    }


def _write_shared(spec: ModelSpec) -> dict[str, Any]:
    own = {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "shared_intermediate_size": spec.shared_ffn_dim or 0,
    }
    return _write(spec) | own


_NAMES: dict[str, Any] = {
    "network": "block_sparse_moe.",
    "beside": "shared_mlp.",
    "beside_rows": ("input_linear", "output_linear"),
}
_OURS: dict[str, Any] = {
    "published": ExpertNames(
        router="router.layer.weight", stacked=("input_linear.weight", "output_linear.weight"), **_NAMES
    ),
    "fused": ExpertNames(router="router.weight", **_NAMES),
}

GRANITE_MOE = Family(read=_granite, write=_write, **_OURS)
GRANITE_MOE_SHARED = Family(read=_read_shared, write=_write_shared, **_OURS)
