"""Read and write what several families have in common: sizes, heads, networks and their routing, limits of groups."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import REQUIRED, ConfigKeys
from fairseq_moe.convert.spec import Mla, ModelSpec, Routing

__all__ = [
    "ROUTED_ALONE",
    "biased_sigmoid",
    "common_sizes",
    "dense_in_front",
    "grouped_heads",
    "latent_heads",
    "limited_groups",
    "write_latent_heads",
    "write_networks",
]

ROUTED_ALONE = "transformers routes this family in no other way"


def common_sizes(keys: ConfigKeys, *, max_positions: int, tied: bool = False) -> dict[str, Any]:
    """Read the sizes that every family calls by the same names.

    Args:
        keys: of config.json.
        max_positions: what an absent length means.
        tied: what it means where nothing says whether the output projection is the embedding.
    """
    return {
        "family": keys.values["model_type"],
        "vocab_size": keys.integer("vocab_size"),
        "model_dim": keys.integer("hidden_size"),
        "num_layers": keys.integer("num_hidden_layers"),
        "num_heads": keys.integer("num_attention_heads"),
        "tied": keys.flag("tie_word_embeddings", tied),
        "max_positions": keys.integer("max_position_embeddings", default=max_positions, null=True),
        "init_std": keys.number("initializer_range", 0.02, null=True),
        "attention_dropout": keys.number("attention_dropout", 0.0),
    }


def grouped_heads(
    keys: ConfigKeys,
    common: dict[str, Any],
    *,
    if_null: bool = False,
    if_absent: bool = False,
    head_dim: int | None = None,
    interleaved: bool = False,
    fraction: float | None = None,
) -> dict[str, Any]:
    """Read the sizes of heads, and their positions.

    Args:
        keys: of config.json.
        common: what ``common_sizes`` found.
        if_null: a null number of key heads means as many as query heads.
        if_absent: an absent one does.
        head_dim: what an absent size of a head means; None: the width divided by the heads, as null does.
        interleaved: neighbouring values turn as a pair.
        fraction: share of a head that turns where no key says so; None: heads of this family turn whole.
    """
    heads = common["num_heads"]
    means_heads = if_null if "num_key_value_heads" in keys.values else if_absent
    kv_heads = keys.integer(
        "num_key_value_heads", default=heads if means_heads else REQUIRED, null=means_heads
    )
    if head_dim is None or "head_dim" in keys.values:
        head_dim = common["model_dim"] // heads
    return {
        "num_kv_heads": kv_heads,
        "head_dim": keys.integer("head_dim", default=head_dim, null=if_null),
        "rope": keys.rope(interleaved=interleaved, fraction=fraction),
    }


def latent_heads(keys: ConfigKeys, common: dict[str, Any], *, interleaved: bool) -> dict[str, Any]:
    """Read the sizes of latent attention, and its positions."""
    # null means that queries are not compressed; transformers takes a number where it is absent.
    has_rank = "q_lora_rank" in keys.values
    mla = Mla(
        q_lora_rank=keys.integer("q_lora_rank", default=None if has_rank else REQUIRED),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        v_head_dim=keys.integer("v_head_dim"),
    )
    heads, head_dim = common["num_heads"], mla.qk_nope_head_dim + mla.qk_rope_head_dim
    keys.fixed("num_key_value_heads", heads, why="latent attention has as many as num_attention_heads")
    keys.fixed("head_dim", mla.qk_rope_head_dim, why="it is qk_rope_head_dim in this family")
    keys.fixed("qk_head_dim", head_dim, why="it is qk_nope_head_dim and qk_rope_head_dim together")
    keys.fixed(
        "attention_bias",
        False,
        why="biases of latent attention are not converted; no published model has them",
    )
    return {
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "mla": mla,
        "rope": keys.rope(interleaved=interleaved),
    }


def write_latent_heads(spec: ModelSpec) -> dict[str, Any]:
    """List the sizes that ``latent_heads`` reads and no other family has."""
    assert spec.mla is not None
    return {
        "kv_lora_rank": spec.mla.kv_lora_rank,
        "q_lora_rank": spec.mla.q_lora_rank,
        "qk_nope_head_dim": spec.mla.qk_nope_head_dim,
        "qk_rope_head_dim": spec.mla.qk_rope_head_dim,
        "v_head_dim": spec.mla.v_head_dim,
    }


def dense_in_front(keys: ConfigKeys, num_layers: int, *, default: Any) -> tuple[bool, ...]:
    """Read how many layers in front have no experts; return for each layer whether it has."""
    keys.fixed("moe_layer_freq", 1, why="transformers takes every layer after first_k_dense_replace")
    num_dense = min(keys.integer("first_k_dense_replace", default=default, least=0), num_layers)
    return tuple(index >= num_dense for index in range(num_layers))


def biased_sigmoid(keys: ConfigKeys, *, scaling: Any) -> Routing:
    """Read DeepSeek-V3's routing in a family that knows no groups unless it is told so.

    Args:
        keys: of config.json.
        scaling: factor of the weights where no key says so.
    """
    keys.fixed("scoring_func", "sigmoid", why=ROUTED_ALONE)
    keys.fixed("topk_method", "noaux_tc", why=ROUTED_ALONE)
    keys.fixed("norm_topk_prob", True, why="weights of sigmoid scores are divided by their sum here")
    groups, kept = keys.integer("n_group", default=1), keys.integer("topk_group", default=1)
    limited = limited_groups(keys, groups, kept, score="best_two")
    return Routing(
        num_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        score="sigmoid",
        normalized=True,
        expert_bias=True,
        scaling=keys.number("routed_scaling_factor", scaling, positive=True),
        **(limited if groups > 1 else {}),
    )


def write_networks(spec: ModelSpec) -> dict[str, Any]:
    """List the keys of networks and routing as DeepSeek's families and those after them call them."""
    routing = spec.routing
    return {
        "first_k_dense_replace": spec.moe_layers.index(True),
        "intermediate_size": spec.dense_ffn_dim or spec.expert_ffn_dim,
        "moe_intermediate_size": spec.expert_ffn_dim,
        "n_group": routing.num_groups or 1,
        "n_routed_experts": routing.num_experts,
        "n_shared_experts": (spec.shared_ffn_dim or 0) // spec.expert_ffn_dim,
        "norm_topk_prob": routing.normalized,
        "routed_scaling_factor": routing.scaling,
        "scoring_func": routing.score,
        "topk_group": routing.group_topk or 1,
    }


def limited_groups(keys: ConfigKeys, groups: int, kept: int, *, score: str) -> dict[str, Any]:
    """Describe a choice among ``groups`` of experts, of which ``kept`` are left by their ``score``."""
    if kept > groups and not keys.problems:
        keys.problems.append(f"{keys.source} describes a model with topk_group above n_group.")
    return {"num_groups": groups, "group_topk": kept, "group_score": score}
