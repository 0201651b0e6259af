"""Refuse our model flags beside a model that does not have them: an encoder-decoder, or another language model.

fairseq's parser calls them unrecognised below some hundred lines of usage; hydra hands them to a model that ignores
them.
"""

import argparse
from collections.abc import Collection, Sequence
from typing import Any

from fairseq.models import (
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    MODEL_REGISTRY,
    FairseqEncoderDecoderModel,
)

from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.records import declared_fields, flag_name, getter
from fairseq_moe.models.flags import MODEL_RECORDS
from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModel

__all__ = ["other_model_problems", "refuse_flags_of_other_models"]


def refuse_flags_of_other_models(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Look at a training command line before stock parses it.

    Args:
        parser: knows --arch, if the command takes it, and no flag of a model yet.
        argv: arguments without the program's name.

    Raises:
        ConfigError: it has flags of ours that its architecture does not know.
    """
    if "--arch" not in parser._option_string_actions:
        return
    typed = {word.split("=")[0] for word in argv if word.startswith("--")}
    flags = [flag_name(field.name) for record in MODEL_RECORDS for field in declared_fields(record)]
    given = [flag for flag in flags if flag in typed]
    if not given:
        return
    arch = parser.parse_known_args(list(argv))[0].arch
    model = _model_of(arch)
    if _has_our_flags(model):
        return
    known = argparse.ArgumentParser(add_help=False, conflict_handler="resolve", parents=[parser])
    if hasattr(model, "add_args"):
        model.add_args(known)
    problems = _problems([flag for flag in given if flag not in known._option_string_actions], arch, model)
    if problems:
        raise ConfigError(problems)


def other_model_problems(cfg: Any) -> list[str]:
    """List one sentence if a configuration gives flags of ours to a model that does not have them.

    Args:
        cfg: a whole fairseq configuration, of a command that builds a model from it.
    """
    settings = getattr(cfg, "model", None)
    if settings is None or isinstance(settings, argparse.Namespace):  # whatever stands there, a parser knew
        return []
    get = getter(settings)
    name = get("_name")
    model = _model_of(name)
    if model is None or _has_our_flags(model):
        return []
    own = MODEL_DATACLASS_REGISTRY.get(name)
    known: Collection[str] = getattr(own, "__dataclass_fields__", {})
    given = [
        flag_name(field.name)
        for record in MODEL_RECORDS
        for field in declared_fields(record)
        if field.name not in known and get(field.name) not in (None, field.default)
    ]
    return _problems(given, name, model)


def _model_of(name: str | None) -> Any:
    return ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)


def _has_our_flags(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, MoETransformerLanguageModel)


def _problems(flags: list[str], name: str | None, model: Any) -> list[str]:
    if not flags:
        return []
    if name is None:
        return [f"{', '.join(flags)}: --arch is not given; choose one of the transformer_lm architectures."]
    is_encoder_decoder = isinstance(model, type) and issubclass(model, FairseqEncoderDecoderModel)
    kind = " (an encoder-decoder model, for which there are no experts yet)" if is_encoder_decoder else ""
    return [
        f"{', '.join(flags)} can be given to the transformer_lm architectures, and {name}{kind} is none of them; "
        "leave the flags out, or choose another --arch (for hydra model=transformer_lm)."
    ]
