"""Write a config.json that transformers 4 and 5 both understand."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from fairseq_moe.convert.hf.config_keys import rope_keys
from fairseq_moe.convert.hf.families import FAMILIES, read_config
from fairseq_moe.convert.spec import ModelSpec, differences
from fairseq_moe.errors import ConfigError

__all__ = ["as_family_of", "fitting_family", "write_config"]


def write_config(
    spec: ModelSpec, *, like: dict[str, Any] | None = None, dtype: str, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Write a config.json for transformers 4 and 5.

    Args:
        spec: what the model is.
        like: the config.json that the model came with; what it says besides is kept, but for quantisation.
        dtype: of the weights, such as ``bfloat16``.
        ignored: keys of ``like`` that the user says change nothing.

    Raises:
        ConfigError: ``like`` describes another model.
    """
    values = _fresh(spec) if like is None else _unquantized(like)
    values |= _positions(spec, like, ignored) | {"torch_dtype": dtype, "dtype": dtype}
    again = read_config(values, ignored=ignored)
    wrong = _differences(spec, again)
    if spec.mtp_layers not in (0, again.mtp_layers):
        wrong.append(f"--mtp-layers is {again.mtp_layers}, expected {spec.mtp_layers}")
    if wrong:
        subject = (
            f"a config.json of model_type {spec.family}" if like is None else "the config.json it came with"
        )
        raise ConfigError([f"{subject} cannot describe this model: there {'; '.join(wrong)}."])
    # After the comparison, which a number of experts that is written here would hide.
    experts_key = FAMILIES[spec.family].num_experts_key
    if experts_key is not None and values.get(experts_key) is None:
        values[experts_key] = spec.routing.num_experts
    if values.get("num_mtp_layers") is not None:
        values.setdefault("num_nextn_predict_layers", values["num_mtp_layers"])
    return dict(sorted(values.items()))


def _unquantized(like: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in like.items() if key != "quantization_config"}


def _positions(spec: ModelSpec, like: dict[str, Any] | None, ignored: Collection[str]) -> dict[str, Any]:
    """Write the keys of positions, none if those of ``like`` have another form of the same ones."""
    forms = [] if like is None else [like.get("rope_scaling"), like.get("rope_parameters")]
    has_alpha = any(isinstance(form, dict) and form.get("alpha") for form in forms)
    if like is not None and has_alpha and read_config(_unquantized(like), ignored=ignored).rope == spec.rope:
        return {}
    return _rope_keys(spec)


def _rope_keys(spec: ModelSpec) -> dict[str, Any]:
    return rope_keys(spec.rope, knows_parts=FAMILIES[spec.family].knows_parts)


def as_family_of(spec: ModelSpec, like: dict[str, Any] | None, *, ignored: Collection[str] = ()) -> ModelSpec:
    """Give a model the family of the config.json that it came with, if that describes it; several families may.

    Args:
        spec: what the model is.
        like: the config.json; None: there is none.
        ignored: keys of ``like`` that the user says change nothing.
    """
    if like is None or like.get("model_type") not in FAMILIES:
        return spec
    own = replace(spec, family=like["model_type"])
    return spec if _differences(own, read_config(_unquantized(like), ignored=ignored)) else own


def _differences(spec: ModelSpec, found: ModelSpec) -> list[str]:
    # Files may lack the prediction blocks that a config promises (transformers leaves them out), not the other way.
    return differences(spec, replace(found, mtp_layers=spec.mtp_layers))


def fitting_family(spec: ModelSpec) -> str:
    """Find the first family whose config.json can describe a model; where none can, the one that comes nearest."""
    distances: dict[str, int] = {}
    for kind in (kind for kind, family in FAMILIES.items() if family.is_latent == (spec.mla is not None)):
        own = replace(spec, family=kind)
        try:
            wrong = differences(own, read_config(_fresh(own) | _rope_keys(own)))
        except ConfigError as error:
            wrong = error.problems
        if not wrong:
            return kind
        distances[kind] = len(wrong)
    return min(distances, key=lambda kind: distances[kind])


def _fresh(spec: ModelSpec) -> dict[str, Any]:
    """Write all keys but those of positions."""
    return {
        "model_type": spec.family,
        "hidden_act": "silu",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.model_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "initializer_range": spec.init_std,
        "attention_dropout": spec.attention_dropout,
        "num_experts_per_tok": spec.routing.top_k,
        "tie_word_embeddings": spec.tied,
    } | FAMILIES[spec.family].write(spec)
