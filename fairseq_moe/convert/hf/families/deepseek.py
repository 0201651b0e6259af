"""Read and write the config.json of DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437) and Kimi-K2.

Kimi-K2 (arXiv 2507.20534) is a DeepSeek-V3 with a ``model_type`` of its own, so that engines can tell them apart.
"""

from dataclasses import replace
from typing import Any

from fairseq_moe.convert.hf.config_keys import REQUIRED, ConfigKeys
from fairseq_moe.convert.hf.families.common import (
    ROUTED_ALONE,
    common_sizes,
    dense_in_front,
    latent_heads,
    limited_groups,
    write_latent_heads,
    write_networks,
)
from fairseq_moe.convert.hf.families.family import Family
from fairseq_moe.convert.spec import ModelSpec, Routing

__all__ = ["DEEPSEEK_V2", "DEEPSEEK_V3", "KIMI_K2"]


def _deepseek(
    keys: ConfigKeys, *, routing: Routing, interleaved: bool, num_dense: Any, **own: Any
) -> ModelSpec:
    common = common_sizes(keys, max_positions=4096)
    heads = latent_heads(keys, common, interleaved=interleaved)
    keys.fixed("mlp_bias", False, why="networks here have no biases")
    moe_layers = dense_in_front(keys, common["num_layers"], default=num_dense)
    width, shared = (
        keys.integer("moe_intermediate_size"),
        keys.integer("n_shared_experts", default=0, least=0),
    )
    dense_dim = keys.integer("intermediate_size")
    return ModelSpec(
        **common,
        **heads,
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        dense_ffn_dim=None if all(moe_layers) else dense_dim,
        expert_ffn_dim=width,
        shared_ffn_dim=width * shared or None,
        moe_layers=moe_layers,
        routing=routing,
        **own,
    )


def _deepseek_routing(keys: ConfigKeys, **own: Any) -> Routing:
    return Routing(
        num_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        aux_loss_coeff=keys.number("aux_loss_alpha", 0.0),
        aux_loss_per_sequence=keys.flag("seq_aux", True),
        **own,
    )


def _deepseek_v2(keys: ConfigKeys) -> ModelSpec:
    keys.fixed("scoring_func", "softmax", why="transformers knows no other for this family")
    keys.fixed(
        "norm_topk_prob",
        False,
        why="the published code then normalises in place of scaling, transformers ignores the key",
    )
    method = keys.one_of(
        "topk_method", ("greedy", "group_limited_greedy"), default="greedy", why=ROUTED_ALONE
    )
    groups, kept = keys.integer("n_group", default=None), keys.integer("topk_group", default=None)
    limited: dict[str, Any] = {}
    if method == "group_limited_greedy":
        if groups is None or kept is None:
            keys.problems.append(f"{keys.source} has topk_method {method} without n_group and topk_group.")
        else:
            limited = limited_groups(keys, groups, kept, score="max")
    scaling = keys.number("routed_scaling_factor", 1.0, positive=True)
    routing = _deepseek_routing(keys, scaling=scaling, **limited)
    return _deepseek(keys, routing=routing, interleaved=True, num_dense=0)


def _deepseek_v3(keys: ConfigKeys) -> ModelSpec:
    keys.fixed("scoring_func", "sigmoid", why=ROUTED_ALONE)
    keys.fixed("topk_method", "noaux_tc", why=ROUTED_ALONE)
    keys.fixed("norm_topk_prob", True, why="weights of sigmoid scores are divided by their sum here")
    # Where one of these is absent, transformers takes that of the 671B model, which another model hardly means.
    groups, kept = keys.integer("n_group"), keys.integer("topk_group")
    scaling = keys.number("routed_scaling_factor", positive=True)
    limited = limited_groups(keys, groups, kept, score="best_two")
    routing = _deepseek_routing(
        keys,
        score="sigmoid",
        normalized=True,
        expert_bias=True,
        scaling=scaling,
        **(limited if groups > 1 else {}),
    )
    return _deepseek(
        keys,
        routing=routing,
        interleaved=keys.flag("rope_interleave", True),
        num_dense=REQUIRED,
        mtp_layers=keys.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0),
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    routing, is_v3 = spec.routing, spec.family != "deepseek_v2"
    networks = write_networks(spec)
    own: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "aux_loss_alpha": routing.aux_loss_coeff,
        "moe_layer_freq": 1,
        "n_shared_experts": networks["n_shared_experts"] or None,
        "seq_aux": routing.aux_loss_per_sequence,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if routing.num_groups else "greedy",
    }
    if is_v3:
        own |= {"num_nextn_predict_layers": spec.mtp_layers, "rope_interleave": spec.rope.interleaved}
    return networks | write_latent_heads(spec) | own


DEEPSEEK_V2 = Family(read=_deepseek_v2, write=_write, is_latent=True, routes_in_float32=True)
DEEPSEEK_V3 = Family(read=_deepseek_v3, write=_write, is_latent=True, routes_in_float32=True)
KIMI_K2 = replace(DEEPSEEK_V3, runs_as="deepseek_v3")
