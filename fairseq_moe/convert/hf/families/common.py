"""Read what several families have in common: sizes, heads, limits of groups."""

from typing import Any

from fairseq_moe.convert.hf.config_keys import REQUIRED, ConfigKeys

__all__ = ["ROUTED_ALONE", "common_sizes", "grouped_heads", "limited_groups", "no_sliding_window"]

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
) -> dict[str, Any]:
    """Read the sizes of heads.

    Args:
        keys: of config.json.
        common: of ``common_sizes``.
        if_null: a null number of key heads means as many as query heads.
        if_absent: an absent one does.
        head_dim: what an absent size of a head means; None: the width divided by the heads, as null does.
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
        "rope": keys.rope(interleaved=interleaved),
    }


def no_sliding_window(keys: ConfigKeys) -> None:
    """Refuse a window that is switched on, and layers of other kinds than full attention."""
    keys.fixed("use_sliding_window", False, why="attention here looks at all earlier tokens")
    keys.ignore("sliding_window")
    keys.ignore("layer_types")
    layers = keys.values.get("layer_types")
    if not isinstance(layers, list | None):
        keys.problems.append(f"{keys.source} has layer_types {layers!r}, expected a list of full_attention.")
    elif any(kind != "full_attention" for kind in layers or []):
        keys.problems.append(f"{keys.source} has layer_types other than full_attention.")


def limited_groups(keys: ConfigKeys, groups: int, kept: int, *, score: str) -> dict[str, Any]:
    """Describe a choice among ``groups`` of experts, of which ``kept`` are left by their ``score``."""
    if kept > groups and not keys.problems:
        keys.problems.append(f"{keys.source} describes a model with topk_group above n_group.")
    return {"num_groups": groups, "group_topk": kept, "group_score": score}
