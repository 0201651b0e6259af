"""Read flags as ``fairseq-train`` does, without a data directory, and say everything that keeps them from running."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from fairseq_moe.data.identity_dictionary import load_identity
from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.moe_checks import moe_problems
from fairseq_moe.flags.records import flag_name, getter
from fairseq_moe.models.presets import PRESETS
from fairseq_moe.planner.devices import Device
from fairseq_moe.planner.mapping import Mapping, Precision, mapping_of, precision_of
from fairseq_moe.planner.parsing import configured, parsed
from fairseq_moe.planner.shape import ModelShape, shape_of

__all__ = ["SPECIAL_WORDS", "Job", "read_job"]

SPECIAL_WORDS = 4  # of fairseq's dictionaries: <s>, <pad>, </s>, <unk>
_PADDING = 1  # the number of <pad> there
_AT_LEAST_ONE = (
    "tokens_per_sample",
    "batch_size",
    "max_tokens",
    "update_freq",
    "dict_size",
    "decoder_layers",
    "decoder_embed_dim",
    "decoder_ffn_embed_dim",
    "decoder_attention_heads",
)
# Parts of stock's models that are not counted, and the values that leave them out.
_NOT_COUNTED: dict[str, tuple[Any, ...]] = {
    "adaptive_input": (None, False),
    "adaptive_softmax_cutoff": (None,),
    "base_layers": (None, 0),
    "character_embeddings": (None, False),
    "scale_attn": (None, False),
    "scale_fc": (None, False),
    "scale_heads": (None, False),
    "scale_resids": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Hold what flags say.

    Args:
        shape: sizes of the model.
        mapping: how it is spread.
        precision: bytes of each number.
        padding: number of the dictionary's padding.
        args: the flags, with the architecture's values.
        cfg: the same as a whole fairseq configuration.
    """

    shape: ModelShape
    mapping: Mapping
    precision: Precision
    padding: int
    args: argparse.Namespace
    cfg: Any


def read_job(argv: Sequence[str], *, num_ranks: int, device: Device, num_words: int | None = None) -> Job:
    """Read the flags of ``fairseq-train``.

    Args:
        argv: flags, without the program's name; a data directory may be missing.
        num_ranks: that take part.
        device: of each.
        num_words: V, of the dictionary; None: that of the data directory, of --dict-size, or the published model's.

    Raises:
        ConfigError: the flags cannot be honoured, all sentences at once.
    """
    if num_ranks < 1:
        raise ConfigError([f"the number of ranks is {num_ranks}, expected at least 1."])
    args = parsed(argv, modify_parser=_data_is_optional)
    args.distributed_world_size = num_ranks
    problems = _problems_of_args(args)
    if problems:
        raise ConfigError(problems)
    words, padding = _words_of(args, num_words)
    cfg = _configuration(args, device)
    problems = moe_problems(cfg, world_size=num_ranks)
    if problems:
        raise ConfigError(problems)
    shape = shape_of(args, num_words=words, padding_index=padding)
    if (
        not shape.has_experts
        and num_ranks > 1
        and str(cfg.distributed_training.ddp_backend) == "fully_sharded"
    ):
        raise ConfigError(
            ["--ddp-backend fully_sharded of a model without experts is not planned; choose another backend."]
        )
    return Job(
        shape=shape,
        mapping=mapping_of(cfg, args, num_ranks=num_ranks),
        precision=precision_of(cfg, runs_kernels=device.runs_kernels and shape.has_experts),
        padding=padding,
        args=args,
        cfg=cfg,
    )


def _data_is_optional(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if action.dest == "data" and not action.option_strings:
            action.nargs, action.default, action.required = "?", None, False


def _problems_of_args(args: argparse.Namespace) -> list[str]:
    get = getter(args)
    if get("decoder_layers") is None:
        return [
            f"--arch is {get('arch')}, expected transformer_lm, one of its names, or one of ours (docs/blocks.md)."
        ]
    found = [
        f"{flag_name(name)} changes parts that the planner does not count; leave it out."
        for name, absent in _NOT_COUNTED.items()
        if get(name) not in absent
    ]
    if get("tokens_per_sample") is None:
        found.append("--tokens-per-sample is not given, expected the length of a sequence.")
    return [*found, *_sizes_below_one(args)]


def _sizes_below_one(args: argparse.Namespace) -> Iterator[str]:
    """Refuse sizes of which there must be some; stock looks at none, and ends in an exception."""
    get = getter(args)
    for name in _AT_LEAST_ONE:
        value = get(name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                yield f"{flag_name(name)} is {number}, expected at least 1."


def _words_of(args: argparse.Namespace, given: int | None) -> tuple[int, int]:
    """Count the words of the dictionary, and find the number of its padding."""
    preset = PRESETS.get(str(args.arch))
    if given is not None:
        if given < 1:
            raise ConfigError([f"the vocabulary is {given} words, expected at least 1."])
        return given, _PADDING if preset is None else given
    data = getattr(args, "data", None)
    path = None if data is None else Path(str(data).split(":")[0]) / "dict.txt"
    if path is not None and path.is_file():
        dictionary = load_identity(path) or Dictionary.load(str(path))
        return len(dictionary), int(dictionary.pad())
    if str(args.task) == "dummy_lm" and (preset is None or args.dict_size != _default_dict_size()):
        return -(
            -(int(args.dict_size) + SPECIAL_WORDS) // 8
        ) * 8, _PADDING  # stock fills up to a multiple of 8
    if preset is None:
        raise ConfigError(
            [
                f"the size of the vocabulary is not known: there is no {path}; name a directory that "
                "fairseq-preprocess has written, or give --vocabulary."
                if path is not None
                else "the size of the vocabulary is not known: name a data directory, or give --vocabulary."
            ]
        )
    return preset.vocab_size, preset.vocab_size


def _default_dict_size() -> int:
    from fairseq.benchmark.dummy_lm import DummyLMConfig

    return int(DummyLMConfig.dict_size)


def _configuration(args: argparse.Namespace, device: Device) -> Any:
    """Make the whole configuration that is checked as a run's would be."""
    given = argparse.Namespace(**vars(args))
    if getattr(given, "data", "") is None:
        given.data = "."  # a plan needs none
    if device.runs_kernels:
        given.cpu = False
        given.moe_fp8 = None  # whether this machine has such a device does not matter
    return configured(given)
