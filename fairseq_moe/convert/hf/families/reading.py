"""Read what a model is from a config.json, whatever its family."""

from collections.abc import Collection
from typing import Any

from fairseq_moe.convert.hf.config_keys import ConfigKeys
from fairseq_moe.convert.hf.families.table import FAMILIES
from fairseq_moe.convert.hf.kinds import fp8_block
from fairseq_moe.convert.spec import ModelSpec
from fairseq_moe.errors import ConfigError

__all__ = ["read_config", "read_keys"]

_WRAPPERS = {"kimi_k25": ", which sees images through a second model and holds a kimi_k2 under text_config"}


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
        inside = _WRAPPERS.get(str(kind), "")
        expected = f"expected one of {', '.join(FAMILIES)}; convert such a model."
        raise ConfigError([f"{source} has model_type {kind!r}{inside}, {expected}"])
    fp8_block(values, source=source)
    keys = ConfigKeys(values, source=source, ignored=ignored)
    keys.fixed("hidden_act", "silu", why="the experts here are SwiGLU networks")
    # Read from any config by transformers, whatever the family; null makes attention look ahead.
    keys.fixed("is_causal", True, why="attention here looks back alone")
    keys.ignore("model_type", "quantization_config")  # read here and by fp8_block
    spec = FAMILIES[kind].read(keys)
    if not keys.problems:
        _check_sizes(keys, spec)
    return spec, keys.finish()


def _check_sizes(keys: ConfigKeys, spec: ModelSpec) -> None:
    routing, group_size = spec.routing, spec.routing.num_experts // (spec.routing.num_groups or 1)
    turned = "head_dim" if spec.mla is None else "qk_rope_head_dim"
    turned_dim = int(spec.head_dim * spec.rope.fraction) if spec.mla is None else spec.mla.qk_rope_head_dim
    for problem, text in (
        (
            turned_dim % 2 or turned_dim < 2,
            f"an odd {turned}, of which positions turn pairs of values"
            if spec.rope.fraction == 1
            else f"a partial_rotary_factor that turns {turned_dim} values of a head, which are no pairs",
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
