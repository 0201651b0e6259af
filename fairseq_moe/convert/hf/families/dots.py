"""Read and write the config.json of dots.llm1 (arXiv 2506.05767)."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import (
    biased_sigmoid,
    common_sizes,
    dense_in_front,
    grouped_heads,
)
from fairseq_moe.convert.hf.families.family import Family
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["DOTS1"]

_WINDOW, _FIRST_WINDOW = 4096, 62  # transformers' where a key is absent


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=2048)
    _no_window(keys, common["num_layers"])
    if "norm_topk_prob" not in keys.values:
        keys.problems.append(
            f"{keys.source} has no norm_topk_prob, which is false in this family, expected true: weights of sigmoid "
            "scores are divided by their sum here."
        )
    moe_layers = dense_in_front(keys, common["num_layers"], default=0)
    width, dense_dim = keys.integer("moe_intermediate_size"), keys.integer("intermediate_size")
    return ModelSpec(
        **common,
        **grouped_heads(keys, common, if_null=True),
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        qk_norm="head",
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        dense_ffn_dim=None if all(moe_layers) else dense_dim,
        expert_ffn_dim=width,
        shared_ffn_dim=width * keys.integer("n_shared_experts"),
        moe_layers=moe_layers,
        routing=biased_sigmoid(keys, scaling=1.0),
    )


def _no_window(keys: ConfigKeys, num_layers: int) -> None:
    """Refuse layers that see a window alone: as listed, or those from ``max_window_layers`` on if there is a window."""
    keys.ignore("layer_types", "sliding_window", "max_window_layers")
    kinds = keys.values.get("layer_types")
    if kinds is None:
        window, first = (
            keys.values.get("sliding_window", _WINDOW),
            keys.integer("max_window_layers", default=_FIRST_WINDOW, least=0),
        )
        has_window = window is not None and first < num_layers
    else:
        has_window = kinds != ["full_attention"] * num_layers
    if has_window:
        keys.problems.append(
            f"{keys.source} has layers with a sliding window (layer_types, or sliding_window with max_window_layers "
            "below the number of layers), expected full_attention in all: attention here looks at all earlier tokens."
        )


def _write(spec: ModelSpec) -> dict[str, Any]:
    routing = spec.routing
    return {
        "architectures": ["Dots1ForCausalLM"],
        "attention_bias": spec.attention_bias == "all",
        "first_k_dense_replace": spec.moe_layers.index(True),
        "head_dim": spec.head_dim,
        "intermediate_size": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "max_window_layers": spec.num_layers,
        "moe_intermediate_size": spec.expert_ffn_dim,
        "n_group": routing.num_groups or 1,
        "n_routed_experts": routing.num_experts,
        "n_shared_experts": (spec.shared_ffn_dim or 0) // spec.expert_ffn_dim,
        "norm_topk_prob": routing.normalized,
        "routed_scaling_factor": routing.scaling,
        "scoring_func": routing.score,
        "sliding_window": None,
        "topk_group": routing.group_topk or 1,
    }


DOTS1 = Family(read=_read, write=_write, routes_in_float32=True)
