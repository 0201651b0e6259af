"""Read what a model is from the config.json of its family.

Published files (transformers 4) leave out what was a default of their modelling code; transformers 5 writes
everything. Both are read. A key that is not understood is refused, because a model that is read without it
may be another model.
"""

from collections.abc import Callable, Collection
from typing import Any

from fairseq_moe.convert.hf.config_keys import REQUIRED, ConfigKeys
from fairseq_moe.convert.hf.kinds import fp8_block
from fairseq_moe.convert.spec import Mla, ModelSpec, Routing
from fairseq_moe.errors import ConfigError

__all__ = ["FAMILIES", "read_config", "read_keys"]

_ROUTED = "transformers routes this family in no other way"


def read_config(
    values: dict[str, Any], *, source: str = "config.json", ignored: Collection[str] = ()
) -> ModelSpec:
    """Read what a model is from its config.json; arguments and errors as ``read_keys``."""
    return read_keys(values, source=source, ignored=ignored)[0]


def read_keys(
    values: dict[str, Any], *, source: str = "config.json", ignored: Collection[str] = ()
) -> tuple[ModelSpec, list[str]]:
    """Read what a model is, and which keys are carried along although nothing of ours reads them.

    Args:
        values: the parsed config.json.
        source: its name, for messages.
        ignored: further keys that the user says change nothing.

    Raises:
        ConfigError: another family, or settings that change the model and are not supported, each by name.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(
            [
                f"{source} has model_type {kind!r}, expected one of {', '.join(FAMILIES)}; convert such a model."
            ]
        )
    fp8_block(values, source=source)
    keys = ConfigKeys(values, source=source, ignored=ignored)
    keys.fixed("hidden_act", "silu", why="the experts here are SwiGLU networks")
    # Read from any config by transformers, whatever the family; null makes attention look ahead.
    keys.fixed("is_causal", True, why="attention here looks back alone")
    keys.ignore("model_type", "quantization_config")  # read here and by fp8_block
    spec = FAMILIES[kind](keys)
    if not keys.problems:
        _check_sizes(keys, spec)
    return spec, keys.finish()


def _check_sizes(keys: ConfigKeys, spec: ModelSpec) -> None:
    routing, group_size = spec.routing, spec.routing.num_experts // (spec.routing.num_groups or 1)
    turned = "head_dim" if spec.mla is None else "qk_rope_head_dim"
    for problem, text in (
        (
            (spec.head_dim if spec.mla is None else spec.mla.qk_rope_head_dim) % 2,
            f"an odd {turned}, of which positions turn pairs of values",
        ),
        (spec.num_heads % spec.num_kv_heads, "num_attention_heads not a multiple of num_key_value_heads"),
        (spec.attention_dropout > 1, "attention_dropout above 1"),
        (not any(spec.moe_layers), "no layer with experts"),
        (not 1 <= routing.top_k <= routing.num_experts, "num_experts_per_tok not between 1 and the experts"),
        (routing.num_experts % (routing.num_groups or 1), "experts that do not divide over n_group groups"),
        (
            routing.group_topk and routing.top_k > routing.group_topk * group_size,
            "num_experts_per_tok above the experts of topk_group groups",
        ),
        (
            routing.group_score == "best_two" and group_size < 2,
            "groups of one expert, of which the best two are counted",
        ),
        (
            routing.normalized and routing.top_k == 1,
            ("norm_topk_prob and " if "norm_topk_prob" in keys.values else "")
            + "num_experts_per_tok 1: its weight, divided by its own sum, is 1 for every token, so that the router "
            "could not learn",
        ),
    ):
        if problem:
            keys.problems.append(f"{keys.source} describes a model with {text}.")


def _common(keys: ConfigKeys, *, max_positions: int) -> dict[str, Any]:
    return {
        "family": keys.values["model_type"],
        "vocab_size": keys.integer("vocab_size"),
        "model_dim": keys.integer("hidden_size"),
        "num_layers": keys.integer("num_hidden_layers"),
        "num_heads": keys.integer("num_attention_heads"),
        "tied": keys.flag("tie_word_embeddings", False),
        "max_positions": keys.integer("max_position_embeddings", default=max_positions, null=True),
        "init_std": keys.number("initializer_range", 0.02, null=True),
        "attention_dropout": keys.number("attention_dropout", 0.0),
    }


def _grouped_heads(
    keys: ConfigKeys, common: dict[str, Any], *, if_null: bool = False, if_absent: bool = False
) -> dict[str, Any]:
    """Read the sizes of heads; whether a null or absent number of key heads means as many as query heads."""
    heads = common["num_heads"]
    means_heads = if_null if "num_key_value_heads" in keys.values else if_absent
    kv_heads = keys.integer(
        "num_key_value_heads", default=heads if means_heads else REQUIRED, null=means_heads
    )
    return {
        "num_kv_heads": kv_heads,
        "head_dim": keys.integer("head_dim", default=common["model_dim"] // heads, null=if_null),
        "rope": keys.rope(interleaved=False),
    }


def _no_sliding_window(keys: ConfigKeys) -> None:
    keys.fixed("use_sliding_window", False, why="attention here looks at all earlier tokens")
    keys.ignore("sliding_window")
    keys.ignore("layer_types")
    layers = keys.values.get("layer_types")
    if not isinstance(layers, list | None):
        keys.problems.append(f"{keys.source} has layer_types {layers!r}, expected a list of full_attention.")
    elif any(kind != "full_attention" for kind in layers or []):
        keys.problems.append(f"{keys.source} has layer_types other than full_attention.")


def _mixtral(keys: ConfigKeys) -> ModelSpec:
    common = _common(keys, max_positions=131072)
    keys.fixed("sliding_window", why="attention here looks at all earlier tokens")  # 0: at none of them
    keys.fixed("router_jitter_noise", 0, 0.0, why="experts here get what the router gets")
    routing = Routing(
        num_experts=keys.integer("num_local_experts", "num_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        normalized=True,
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    return ModelSpec(
        **common,
        **_grouped_heads(keys, common, if_null=True),
        norm_eps=keys.number("rms_norm_eps", 1e-5, positive=True),
        expert_ffn_dim=keys.integer("intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        routing=routing,
    )


def _olmoe(keys: ConfigKeys) -> ModelSpec:
    common = _common(keys, max_positions=4096)
    routing = Routing(
        num_experts=keys.integer("num_experts", "num_local_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        normalized=keys.flag("norm_topk_prob", False),
        aux_loss_coeff=keys.number("router_aux_loss_coef", 0.0),
    )
    return ModelSpec(
        **common,
        **_grouped_heads(keys, common, if_null=True, if_absent=True),
        attention_bias="all" if keys.flag("attention_bias", False) else "none",
        qk_norm="full",
        clip_qkv=keys.number("clip_qkv", None, positive=True),
        norm_eps=keys.number("rms_norm_eps", 1e-5, positive=True),
        expert_ffn_dim=keys.integer("intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        routing=routing,
    )


def _qwen(keys: ConfigKeys, **own: Any) -> ModelSpec:
    common = _common(keys, max_positions=32768)
    _no_sliding_window(keys)
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
        **_grouped_heads(keys, common),
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


def _deepseek(
    keys: ConfigKeys, *, routing: Routing, interleaved: bool, num_dense: Any, **own: Any
) -> ModelSpec:
    common = _common(keys, max_positions=4096)
    heads, layers = common["num_heads"], common["num_layers"]
    # null means that queries are not compressed; transformers takes 1536 where it is absent.
    has_rank = "q_lora_rank" in keys.values
    mla = Mla(
        q_lora_rank=keys.integer("q_lora_rank", default=None if has_rank else REQUIRED),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        v_head_dim=keys.integer("v_head_dim"),
    )
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    keys.fixed("num_key_value_heads", heads, why="latent attention has as many as num_attention_heads")
    keys.fixed("head_dim", mla.qk_rope_head_dim, why="it is qk_rope_head_dim in this family")
    keys.fixed("qk_head_dim", head_dim, why="it is qk_nope_head_dim and qk_rope_head_dim together")
    keys.fixed(
        "attention_bias",
        False,
        why="biases of latent attention are not converted; no published model has them",
    )
    keys.fixed("mlp_bias", False, why="networks here have no biases")
    keys.fixed("moe_layer_freq", 1, why="transformers takes every layer after first_k_dense_replace")
    num_dense = min(keys.integer("first_k_dense_replace", default=num_dense, least=0), layers)
    width, shared = (
        keys.integer("moe_intermediate_size"),
        keys.integer("n_shared_experts", default=0, least=0),
    )
    dense_dim = keys.integer("intermediate_size")
    return ModelSpec(
        **common,
        num_kv_heads=heads,
        head_dim=head_dim,
        mla=mla,
        rope=keys.rope(interleaved=interleaved),
        norm_eps=keys.number("rms_norm_eps", 1e-6, positive=True),
        dense_ffn_dim=dense_dim if num_dense else None,
        expert_ffn_dim=width,
        shared_ffn_dim=width * shared or None,
        moe_layers=tuple(index >= num_dense for index in range(layers)),
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
    method = keys.one_of("topk_method", ("greedy", "group_limited_greedy"), default="greedy", why=_ROUTED)
    groups, kept = keys.integer("n_group", default=None), keys.integer("topk_group", default=None)
    limited: dict[str, Any] = {}
    if method == "group_limited_greedy":
        if groups is None or kept is None:
            keys.problems.append(f"{keys.source} has topk_method {method} without n_group and topk_group.")
        else:
            limited = _limited(keys, groups, kept, score="max")
    scaling = keys.number("routed_scaling_factor", 1.0, positive=True)
    routing = _deepseek_routing(keys, scaling=scaling, **limited)
    return _deepseek(keys, routing=routing, interleaved=True, num_dense=0)


def _limited(keys: ConfigKeys, groups: int, kept: int, *, score: str) -> dict[str, Any]:
    if kept > groups and not keys.problems:
        keys.problems.append(f"{keys.source} describes a model with topk_group above n_group.")
    return {"num_groups": groups, "group_topk": kept, "group_score": score}


def _deepseek_v3(keys: ConfigKeys) -> ModelSpec:
    keys.fixed("scoring_func", "sigmoid", why=_ROUTED)
    keys.fixed("topk_method", "noaux_tc", why=_ROUTED)
    keys.fixed("norm_topk_prob", True, why="weights of sigmoid scores are divided by their sum here")
    # Where one of these is absent, transformers takes that of the 671B model, which another model hardly means.
    groups, kept = keys.integer("n_group"), keys.integer("topk_group")
    scaling = keys.number("routed_scaling_factor", positive=True)
    limited = _limited(keys, groups, kept, score="best_two")
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


FAMILIES: dict[str, Callable[[ConfigKeys], ModelSpec]] = {
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "qwen2_moe": _qwen2_moe,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
}
