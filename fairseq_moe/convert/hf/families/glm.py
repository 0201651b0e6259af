"""Read and write the config.json of GLM-4.5, 4.6 and 4.7 (arXiv 2508.06471) and of GLM-4.7-Flash."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import REQUIRED, ConfigKeys
from fairseq_moe.convert.hf.families.common import (
    biased_sigmoid,
    common_sizes,
    dense_in_front,
    grouped_heads,
    latent_heads,
    write_latent_heads,
    write_networks,
)
from fairseq_moe.convert.hf.families.family import Family
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["GLM4_MOE", "GLM4_MOE_LITE"]

_KINDS = {"dense": False, "sparse": True}


def _glm4_moe(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=131072)
    return ModelSpec(
        **common,
        **grouped_heads(keys, common, fraction=0.5),
        attention_bias="qkv" if keys.flag("attention_bias", False) else "none",
        qk_norm="head" if keys.flag("use_qk_norm", False) else "none",
        **_networks(keys, dense_in_front(keys, common["num_layers"], default=1), scaling=1.0),
    )


def _glm4_moe_lite(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=202752)
    heads = latent_heads(keys, common, interleaved=keys.flag("rope_interleave", True))
    # Where it is absent, transformers takes that of the published model, which another model hardly means.
    return ModelSpec(**common, **heads, **_networks(keys, _listed_layers(keys, common), scaling=REQUIRED))


def _listed_layers(keys: ConfigKeys, common: dict[str, Any]) -> tuple[bool, ...]:
    """Read for each layer whether it has experts: as listed, or all but the first."""
    kinds = keys.values.get("mlp_layer_types")
    keys.ignore("mlp_layer_types")
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (common["num_layers"] - 1)
    is_list = isinstance(kinds, list) and all(kind in ("dense", "sparse") for kind in kinds)
    if not is_list or len(kinds) != common["num_layers"]:
        keys.problems.append(
            f"{keys.source} has mlp_layer_types {kinds!r}, expected dense or sparse for each of "
            f"{common['num_layers']} layers."
        )
        kinds = ["sparse"] * common["num_layers"]
    found = tuple(_KINDS[kind] for kind in kinds)
    in_front = found.index(True) if True in found else len(found)
    keys.fixed("moe_layer_freq", 1, why="transformers reads mlp_layer_types")
    keys.fixed("first_k_dense_replace", in_front, why="transformers reads mlp_layer_types in place of it")
    return found


def _networks(keys: ConfigKeys, moe_layers: tuple[bool, ...], *, scaling: Any) -> dict[str, Any]:
    keys.fixed("mlp_bias", False, why="networks here have no biases")
    width, dense_dim = keys.integer("moe_intermediate_size"), keys.integer("intermediate_size")
    return {
        "norm_eps": keys.number("rms_norm_eps", 1e-5, positive=True),
        "dense_ffn_dim": None if all(moe_layers) else dense_dim,
        "expert_ffn_dim": width,
        "shared_ffn_dim": width * keys.integer("n_shared_experts", default=1),
        "moe_layers": moe_layers,
        "routing": biased_sigmoid(keys, scaling=scaling),
        "mtp_layers": keys.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0),
    }


def _write_moe(spec: ModelSpec) -> dict[str, Any]:
    return write_networks(spec) | {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": spec.attention_bias == "qkv",
        "head_dim": spec.head_dim,
        "num_nextn_predict_layers": spec.mtp_layers,
        "use_qk_norm": spec.qk_norm == "head",
    }


def _write_lite(spec: ModelSpec) -> dict[str, Any]:
    own = {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "attention_bias": False,
        "mlp_layer_types": ["sparse" if is_moe else "dense" for is_moe in spec.moe_layers],
        "num_nextn_predict_layers": spec.mtp_layers,
        "rope_interleave": spec.rope.interleaved,
    }
    return write_networks(spec) | write_latent_heads(spec) | own


GLM4_MOE = Family(read=_glm4_moe, write=_write_moe, knows_parts=True, routes_in_float32=True)
GLM4_MOE_LITE = Family(read=_glm4_moe_lite, write=_write_lite, is_latent=True, routes_in_float32=True)
