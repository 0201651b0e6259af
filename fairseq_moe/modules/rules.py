"""What every routing rule takes and gives."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from torch import Tensor

from fairseq_moe.modules.routing import RoutingDecision

__all__ = ["LOSSES", "RouterMode", "RouterOutput", "RoutingRule", "TokenInfo"]

# Order of a layer's auxiliary losses, all unscaled:
LOSSES = (
    "balance",  # the moe branch's l_aux, over first choices
    "aux",  # choices of this micro-batch
    "seq_aux",  # choices of each sequence
    "global_aux",  # choices of all ranks and micro-batches of the update so far
    "z",  # size of the logits
)


class RouterMode(Enum):
    """What the tokens are for; it selects the capacity rule, and whether random numbers may be drawn."""

    TRAIN = "train"
    EVAL = "eval"
    GENERATE = "generate"


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What a rule knows of the tokens besides their values.

    Args:
        mode: what they are for.
        padding_T: bool, True where a token is padding; None: no token is.
        ids_T: int64, vocabulary ids; hash routing needs them.
        num_sequences: B, sequences of equal length that the tokens form, batch-major.
    """

    mode: RouterMode
    padding_T: Tensor | None = None
    ids_T: Tensor | None = None
    num_sequences: int = 1


class RouterOutput(NamedTuple):
    """What routing yields.

    A tuple that starts with a tensor, because hooks of the kind that fairseq's search for NaNs puts on every
    module look for the first tensor of its output.

    Args:
        gates_TE: normalised scores, differentiable.
        weights_TK: combine weights, differentiable, in the dtype of the scores; the experts round them.
        decision: who goes where.
        losses: unscaled auxiliary losses by name, differentiable; those of ``LOSSES`` that the rule has.
    """

    gates_TE: Tensor
    weights_TK: Tensor
    decision: RoutingDecision
    losses: dict[str, Tensor]


class RoutingRule(Protocol):
    """From logits to a decision, weights and losses."""

    def route(self, logits_TE: Tensor, tokens: TokenInfo, decision: RoutingDecision | None) -> RouterOutput:
        """Route tokens.

        Args:
            logits_TE: float router logits.
            tokens: about the tokens.
            decision: reuse this decision (a recomputed forward pass) instead of taking one.
        """
        ...
