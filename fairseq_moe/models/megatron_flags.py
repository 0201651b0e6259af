"""Megatron-Core's MoE arguments as flags of the model; what they mean is in ``fairseq_moe.flags.megatron``."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass

from fairseq_moe.flags.megatron import LOAD_BALANCING_TYPES
from fairseq_moe.flags.megatron_aliases import MEGATRON_ARGS, MegatronArg
from fairseq_moe.flags.records import words

__all__ = ["MegatronFlags", "add_list_arguments"]


def _help(row: MegatronArg) -> str:
    if row.does == "alias":
        return f"old name of --{row.text.replace('_', '-')}"
    return f"{'does nothing' if row.does == 'no_op' else row.does}: {row.text}"


_OtherArguments = make_dataclass(
    "_OtherArguments",
    [
        (
            row.name,
            bool if row.kind is bool else Optional[row.kind],
            field(default=False if row.kind is bool else None, metadata={"help": _help(row)}),
        )
        for row in MEGATRON_ARGS
    ],
    bases=(FairseqDataclass,),
)


@dataclass
class MegatronFlags(_OtherArguments):  # type: ignore[misc, valid-type]
    """Flags under Megatron's names; unset means that the moe branch's behaviour is wanted."""

    num_experts: Optional[int] = field(
        default=None, metadata={"help": "experts per MoE layer, routed as in Megatron-Core"}
    )
    expert_model_parallel_size: Optional[int] = field(
        default=None,
        metadata={"help": "ranks over which the experts are spread (default: min(ranks, experts))"},
    )
    moe_layer_freq: Optional[str] = field(
        default=None,
        metadata={
            "help": "N: layers 0, N, 2N, ... have experts; or a pattern such as ([0]+[1]*23) (default: 1)"
        },
    )
    moe_ffn_hidden_size: Optional[int] = field(
        default=None, metadata={"help": "hidden width of an expert (default: --decoder-ffn-embed-dim)"}
    )
    moe_router_topk: Optional[int] = field(default=None, metadata={"help": "experts per token (default: 2)"})
    moe_router_load_balancing_type: Optional[str] = field(
        default=None,
        metadata={
            "help": "aux_loss (default), seq_aux_loss, global_aux_loss, several of these, "
            "quantile_balancing, "
            "sinkhorn, expert_choice or none"
        },
    )
    moe_aux_loss_coeff: Optional[str] = field(
        default=None, metadata={"help": "weight of each balancing loss (default: 0; 1e-2 is a good start)"}
    )
    moe_z_loss_coeff: Optional[float] = field(
        default=None, metadata={"help": "weight of the z-loss on router logits (1e-3 is a good start)"}
    )
    moe_router_score_function: Optional[str] = field(
        default=None, metadata={"help": "softmax (default), sigmoid or sqrtsoftplus"}
    )
    moe_router_pre_softmax: bool = field(
        default=False,
        metadata={"help": "softmax over all experts before the choice; weights are not renormalised"},
    )
    moe_router_topk_scaling_factor: Optional[float] = field(
        default=None, metadata={"help": "multiplies the weights"}
    )
    moe_router_num_groups: Optional[int] = field(
        default=None, metadata={"help": "groups of neighbouring experts for group-limited routing"}
    )
    moe_router_group_topk: Optional[int] = field(
        default=None, metadata={"help": "groups from which a token may choose"}
    )
    moe_router_group_score: Optional[str] = field(
        default=None,
        metadata={
            "help": "score of a group: sum of its best floor(topk / group topk) (default), best_two or max"
        },
    )
    moe_router_enable_expert_bias: bool = field(
        default=False, metadata={"help": "balance by a bias on the choice instead of a loss"}
    )
    moe_router_bias_update_rate: Optional[float] = field(
        default=None, metadata={"help": "step of the expert bias per update (default: 1e-3)"}
    )
    moe_router_force_load_balancing: Optional[str] = field(
        default=None,
        metadata={
            "help": "for benchmarks: random (the default), round_robin or hash (of the token's id) choice",
            "argparse_const": "random",
        },
    )
    moe_expert_capacity_factor: Optional[float] = field(
        default=None,
        metadata={"help": "an expert takes ceil(tokens * topk / experts * factor) rows (default: no limit)"},
    )
    moe_expert_capacity_minimum: Optional[int] = field(default=None, metadata={"help": "smallest capacity"})
    moe_expert_capacity_warmup_updates: Optional[int] = field(
        default=None, metadata={"help": "the capacity holds for so many updates, then nothing is dropped"}
    )
    moe_pad_expert_input_to_capacity: bool = field(
        default=False, metadata={"help": "each expert gets exactly its capacity in rows: static shapes"}
    )
    moe_token_drop_policy: Optional[str] = field(
        default=None, metadata={"help": "who is dropped: probs (default), position or prioritized"}
    )
    moe_token_dispatcher_type: Optional[str] = field(
        default=None, metadata={"help": "alltoall (default) or allgather"}
    )
    moe_input_jitter_eps: Optional[float] = field(
        default=None,
        metadata={"help": "while training the router's input is multiplied by uniform(1-eps, 1+eps)"},
    )
    moe_router_dtype: Optional[str] = field(
        default=None,
        metadata={"help": "precision of router logits: fp32 or fp64 (default: that of the model)"},
    )
    use_xmoe: bool = field(default=False, metadata={"help": "X-MoE's cosine router"})
    moe_shared_expert_intermediate_size: Optional[int] = field(
        default=None, metadata={"help": "width of a network that every token passes besides its experts"}
    )
    moe_shared_expert_gate: bool = field(
        default=False, metadata={"help": "scale the shared network's output by a learned sigmoid gate"}
    )


class _Words(argparse.Action):
    """Several values as one string."""

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

    fairseq builds flags with one value each from the fields above, and skips those that are there already.

    Args:
        parser: an ``argparse`` parser or group.
    """
    for name, check in (
        ("moe_router_load_balancing_type", _is_balancing_type),
        ("moe_aux_loss_coeff", _is_number),
    ):
        description = MegatronFlags.__dataclass_fields__[name].metadata["help"]
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, nargs="+", action=_Words, type=_checked(check), help=description)


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
