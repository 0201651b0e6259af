"""Build models by architecture and flags, with a dictionary whose padding lies outside the words."""

from argparse import Namespace
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from fairseq import options

import fairseq_moe  # noqa: F401
from fairseq_moe.flags.blocks_checks import block_problems
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.moe_checks import expert_problems
from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModel

__all__ = ["WordIds", "build_model", "parse"]


class WordIds:
    """A dictionary, as far as a model needs one: the number of words and an id that is none of them."""

    def __init__(self, num_words: int, *, pad: int | None = None) -> None:
        self.num_words = num_words
        self.pad_id = num_words if pad is None else pad

    def __len__(self) -> int:
        return self.num_words

    def pad(self) -> int:
        """Name the id of padding."""
        return self.pad_id


def parse(arch: str, flags: Sequence[Any] = (), *, max_positions: int = 512) -> Namespace:
    """Parse the model's flags as fairseq-train does."""
    argv = [
        "--task",
        "dummy_lm",
        "--criterion",
        "moe_cross_entropy",
        "--tokens-per-sample",
        str(max_positions),
    ]
    args = options.parse_args_and_arch(
        options.get_training_parser(), [*argv, "--arch", arch, *map(str, flags)]
    )
    moe = MoEConfig.from_args(args)
    problems = block_problems(args) + expert_problems(moe, num_layers=args.decoder_layers, world_size=1)
    assert not problems, problems
    args.max_target_positions = max_positions
    return args


def build_model(args: Namespace, dictionary: WordIds) -> Any:
    """Build the model as fairseq's tasks do."""
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return MoETransformerLanguageModel.build_model(args, task)
