"""Give fairseq the flags that ``fairseq_moe.flags`` declares: as one of its dataclasses, and as arguments.

fairseq makes command-line arguments and hydra's nodes from the fields of a ``FairseqDataclass``. Its parser knows
``Optional[int]`` and not ``int | None``, and an enum where we list choices; otherwise fields are taken as they are.
"""

import argparse
import types
from collections.abc import Callable, Sequence
from dataclasses import Field, field, make_dataclass
from typing import Any, Union, get_args

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.megatron import LOAD_BALANCING_TYPES, MegatronConfig
from fairseq_moe.flags.megatron_aliases import MegatronArgs
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.flags.profiling import ProfileConfig
from fairseq_moe.flags.records import declared_fields, flag_name, words
from fairseq_moe.flags.reliability import ReliabilityConfig
from fairseq_moe.flags.sharding import ShardingConfig

__all__ = ["MODEL_RECORDS", "add_list_arguments", "fairseq_dataclass"]

# The records whose flags are those of the model; help texts appear in this order.
MODEL_RECORDS: tuple[type[Any], ...] = (
    MoEConfig,
    MegatronConfig,
    BlocksConfig,
    ParallelConfig,
    ShardingConfig,
    ReliabilityConfig,
    ProfileConfig,
    MegatronArgs,
)


def fairseq_dataclass(name: str, *records: type[Any]) -> Any:
    """Make the dataclass that fairseq needs from the flags that plain records declare.

    Args:
        name: of the class; a subclass must be written out in a module, where pickle and hydra find it.
        records: of ``fairseq_moe.flags``.
    """
    declared = [entry for record in records for entry in declared_fields(record)]
    entries = [
        (entry.name, _fairseq_type(entry), field(default=entry.default, metadata=entry.metadata))
        for entry in declared
    ]
    return make_dataclass(name, entries, bases=(FairseqDataclass,))


def _fairseq_type(entry: "Field[Any]") -> Any:
    if "choices" in entry.metadata:
        return ChoiceEnum(entry.metadata["choices"])
    if isinstance(entry.type, types.UnionType):
        return Union[get_args(entry.type)]
    return entry.type


class _Words(argparse.Action):
    """Keep several values as one string."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, " ".join(values or ()))


def add_list_arguments(parser: Any) -> None:
    """Add the flags that take several values, as Megatron's users type them: with spaces.

    fairseq builds flags with one value each from the fields of its dataclass, and skips those that are there already.

    Args:
        parser: an ``argparse`` parser or group.
    """
    records = (MegatronConfig, ProfileConfig)
    declared = {entry.name: entry for record in records for entry in declared_fields(record)}
    for name, check in (
        ("moe_router_load_balancing_type", _is_balancing_type),
        ("moe_aux_loss_coeff", _is_number),
        ("profile_ranks", str.isdecimal),
    ):
        text = declared[name].metadata["help"]
        parser.add_argument(flag_name(name), nargs="+", action=_Words, type=_checked(check), help=text)


def _checked(is_good: Callable[[str], bool]) -> Callable[[str], str]:
    def check(text: str) -> str:
        wrong = [word for word in words(text) if not is_good(word)]
        if wrong:
            raise argparse.ArgumentTypeError(
                f"{wrong[0]!r} is not one of its values (if it is the data directory: put that before the "
                "flags)"
            )
        return text

    return check


def _is_balancing_type(word: str) -> bool:
    return word in LOAD_BALANCING_TYPES


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
