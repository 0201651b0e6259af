"""Read and write the config.json of dots.llm1 (arXiv 2506.05767)."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.common import (
    biased_sigmoid,
    common_sizes,
    dense_in_front,
    grouped_heads,
    write_networks,
)
from fairseq_moe.convert.hf.families.family import Family
from fairseq_moe.convert.hf.families.windows import layer_types, window_of, windows
from fairseq_moe.convert.spec import ModelSpec

__all__ = ["DOTS1"]


def _read(keys: ConfigKeys) -> ModelSpec:
    common = common_sizes(keys, max_positions=2048)
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
        **_windows(keys, common["num_layers"]),
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        qk_norm="head",
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        dense_ffn_dim=None if all(moe_layers) else dense_dim,
        expert_ffn_dim=width,
        shared_ffn_dim=width * keys.integer("n_shared_experts"),
        moe_layers=moe_layers,
        routing=biased_sigmoid(keys, scaling=1.0),
    )


def _windows(keys: ConfigKeys, num_layers: int) -> dict[str, Any]:
    window = window_of(keys, absent=4096)
    first = keys.integer("max_window_layers", default=62, least=0)
    default = [window is not None and index >= first for index in range(num_layers)]
    return windows(keys, window, num_layers=num_layers, default=default)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return write_networks(spec) | {
        "architectures": ["Dots1ForCausalLM"],
        "attention_bias": spec.attention_bias == "all",
        "head_dim": spec.head_dim,
        "layer_types": layer_types(spec),
        "sliding_window": spec.window,
    }


DOTS1 = Family(read=_read, write=_write, routes_in_float32=True)
