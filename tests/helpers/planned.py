"""Read flags for the planner without fairseq's whole configuration; build models on ranks that are not there."""

from argparse import Namespace
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import options

import fairseq_moe  # noqa: F401
from fairseq_moe.planner.mapping import Mapping, mapping_of
from fairseq_moe.planner.shape import ModelShape, shape_of
from tests.helpers.presets import WordIds, build_model

__all__ = ["build_on_meta", "mapping_from", "parse_flags", "shape_from"]


def parse_flags(flags: Sequence[Any]) -> Namespace:
    """Parse flags of fairseq-train that are complete."""
    args: Namespace = options.parse_args_and_arch(options.get_training_parser(), list(map(str, flags)))
    args.max_target_positions = args.tokens_per_sample
    return args


def shape_from(args: Namespace, words: WordIds) -> ModelShape:
    """Read the sizes of the model that ``build_on_meta`` builds."""
    return shape_of(args, num_words=len(words), padding_index=words.pad())


def mapping_from(args: Namespace, *, num_ranks: int) -> Mapping:
    """Read the mapping of flags as they are, unchecked."""
    cfg: Any = SimpleNamespace(dataset=args, optimization=args, distributed_training=args)
    return mapping_of(cfg, args, num_ranks=num_ranks)


def build_on_meta(args: Namespace, words: WordIds) -> Any:
    """Build this rank's part of a model, without memory."""
    with torch.device("meta"):
        return build_model(args, words)
