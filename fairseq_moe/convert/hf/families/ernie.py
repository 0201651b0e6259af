"""Read and write the config.json of ERNIE-4.5 (Baidu 2025), the models of text alone."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import common_sizes, grouped_heads
from fairseq_moe.convert.hf.families.family import ExpertNames, Family
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["ERNIE4_5_MOE"]

_NORM_MIN = 1e-12  # of all published models; the chosen probabilities of a token add up to more


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=131072, tied=True)
    keys.fixed("use_bias", False, why="networks here have no biases")
    if keys.number("moe_norm_min", _NORM_MIN) > _NORM_MIN:
        keys.refuse(
            f"moe_norm_min {keys.values['moe_norm_min']!r}, expected at most {_NORM_MIN}: weights here are divided by "
            "their sum, however small it is."
        )
    layers, width = common["num_layers"], keys.integer("moe_intermediate_size")
    shared = keys.integer("moe_num_shared_experts", default=2, least=0)
    moe_layers = _moe_layers(keys, layers)
    dense_dim = keys.integer("intermediate_size")
    return ModelSpec(
        **common,
        **grouped_heads(keys, common, interleaved=True),
        norm_eps=keys.number("rms_norm_eps", 1e-5, positive=True),
        dense_ffn_dim=None if all(moe_layers) else dense_dim,
        expert_ffn_dim=width,
        shared_ffn_dim=width * shared or None,
        moe_layers=moe_layers,
        routing=Routing(
            num_experts=keys.integer("moe_num_experts", "num_experts"),
            top_k=keys.integer("moe_k", "num_experts_per_tok"),
            normalized=True,
            expert_bias=True,
            aux_loss_coeff=keys.number("router_aux_loss_coef", 0.001, null=True),
        ),
    )


def _moe_layers(keys: ConfigKeys, layers: int) -> tuple[bool, ...]:
    """Mark every interval-th layer from the first to the last with experts; -1: the last of all."""
    first = keys.integer("moe_layer_start_index", default=1, least=0)
    last = keys.integer("moe_layer_end_index", default=-1, least=-1)
    step = keys.integer("moe_layer_interval", default=1)
    last = layers - 1 if last == -1 else last
    return tuple(first <= index <= last and (index + 1) % step == 0 for index in range(layers))


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "head_dim": spec.head_dim,
        "intermediate_size": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "moe_intermediate_size": spec.expert_ffn_dim,
        "moe_k": spec.routing.top_k,
        "moe_layer_end_index": spec.num_layers - 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": spec.moe_layers.index(True),
        "moe_norm_min": _NORM_MIN,
        "moe_num_experts": spec.routing.num_experts,
        "moe_num_shared_experts": (spec.shared_ffn_dim or 0) // spec.expert_ffn_dim,
        "router_aux_loss_coef": spec.routing.aux_loss_coeff,
        "use_bias": False,
    }


_NAMES = ExpertNames(expert_bias="moe_statics.e_score_correction_bias", bias_rows=1)

ERNIE4_5_MOE = Family(
    read=_read,
    write=_write,
    routes_in_float32=True,
    published=_NAMES,
    fused=ExpertNames(expert_bias="gate.moe_statics.e_score_correction_bias", bias_rows=1),
    num_experts_key="moe_num_experts",
    left_out=r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\..*",
)
