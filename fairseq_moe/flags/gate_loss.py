"""Declare the flags of the criterion ``moe_cross_entropy``, and refuse those that do not go with the model."""

import functools
import math
from dataclasses import dataclass
from typing import Any

from fairseq_moe.flags.records import Group, Range, changed_fields, flag, flag_name, given_fields, ranges

__all__ = ["GateLossConfig", "gate_loss_problems"]

_flag = functools.partial(flag, Group.LOGGING)

_RANGES: dict[str, Range] = {
    "moe_gate_loss_wt": (lambda weight: 0 <= weight < math.inf, "a finite weight of at least 0"),
}


@dataclass(frozen=True, kw_only=True)
class GateLossConfig:
    """Hold the flags about the moe branch's balance loss."""

    moe_gate_loss_wt: float = _flag(1.0, "weight of the gate (balance) loss")
    moe_gate_loss_combine_method: str = _flag(
        "average", "how the gate losses of the layers are combined", choices=["average", "sum"]
    )
    moe_gate_loss_transform: str = _flag(
        "none", "transformation of the combined gate loss", choices=["none", "neg_log"]
    )


def gate_loss_problems(criterion: Any, *, megatron_routing: bool) -> list[str]:
    """List one sentence per flag of a criterion that cannot be honoured.

    Args:
        criterion: the criterion's flags, of whatever criterion (a namespace, config or mapping), or None.
        megatron_routing: whether the model's routing is Megatron's, which has no balance loss.
    """
    config = GateLossConfig(**given_fields(GateLossConfig, criterion))
    found = ranges(config, _RANGES)
    if found or not megatron_routing:
        return found
    return [
        f"{flag_name(name)} is about the moe branch's balance loss, which --num-experts does not have; use "
        "--moe-aux-loss-coeff instead."
        for name in changed_fields(config)
    ]
