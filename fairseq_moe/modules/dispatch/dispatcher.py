"""Declare what a dispatcher is, and implement it for one rank that holds all experts.

A dispatcher brings rows to the experts that were chosen for them and brings their results back: ``send`` begins, the
``Dispatched`` that it returns ends the two journeys. A ``SendPlan`` says which rows there are: one for each kept
assignment (``plan_kept``), or a fixed number of slots for each expert (``padded.plan_padded``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules.dispatch.rows import ExpertWork, RowPlan, plan_rows, take_weights
from fairseq_moe.modules.routing.contract import RoutingDecision

__all__ = ["Dispatched", "Dispatcher", "LocalDispatcher", "Planner", "SendPlan", "plan_kept"]


class Dispatched(Protocol):
    """Follow the rows of one forward pass to the experts and back."""

    def arrive(self) -> tuple[Tensor, ExpertWork]:
        """Wait for the rows of this rank's experts: what the experts read, (S, D), and what they do with it."""
        ...

    def combine(self, y_SD: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Bring each expert's outputs back to their tokens and add them up by weight: (S, D) -> (T, D).

        Args:
            y_SD: float, what this rank's experts have made of their rows.
            dropout: of each output, where ranks hold parts of experts: only their sum can be dropped.
        """
        ...


class Dispatcher(Protocol):
    """Bring rows to experts and back; holds no parameters."""

    def send(self, x_TD: Tensor, decision: RoutingDecision, weights_TK: Tensor) -> Dispatched:
        """Send rows to the experts that were chosen for them.

        Args:
            x_TD: float tokens.
            decision: their routing.
            weights_TK: float, of each choice.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SendPlan:
    """List the rows that this rank brings to the layer's experts.

    Args:
        rows: sorted by expert; behind those that ``counts_E`` counts there may be more, of what was dropped.
        counts_E: int64, rows for each expert, on the device.
        num_slots: every count, where it is fixed. Then a row may be the *filler*, one token more, of zeros and of
            weight 0, which stands in each slot that stays empty. None: routing decides.
        is_same_everywhere: every rank has this ``num_slots``, and all know it.
    """

    rows: RowPlan
    counts_E: Tensor
    num_slots: int | None = None
    is_same_everywhere: bool = False

    def with_filler(self, values: Tensor) -> Tensor:
        """Append the filler's zeros to the tokens, or to their weights, where rows may be the filler."""
        return values if self.num_slots is None else F.pad(values, (0, 0, 0, 1))

    def without_filler(self, y_TD: Tensor) -> Tensor:
        """Cut the filler off the outputs."""
        return y_TD if self.num_slots is None else y_TD[:-1]


Planner = Callable[[RoutingDecision], SendPlan]


def plan_kept(decision: RoutingDecision) -> SendPlan:
    """Plan one row for each assignment that survived the capacity."""
    return SendPlan(rows=plan_rows(decision), counts_E=decision.counts.kept_E)


class LocalDispatcher:
    """Let the experts read the tokens themselves, and add their weighted results to them: one rank, no copy of a row.

    Args:
        plan: lists the rows.
    """

    def __init__(self, *, plan: Planner = plan_kept) -> None:
        self.plan = plan

    def send(self, x_TD: Tensor, decision: RoutingDecision, weights_TK: Tensor) -> Dispatched:
        """Plan the rows and send nothing; nothing waits for the device."""
        plan = self.plan(decision)
        work = ExpertWork(
            counts_L=plan.counts_E,
            plan=plan.rows,
            weights_R=take_weights(plan.with_filler(weights_TK), plan.rows),
            rows_per_expert=plan.num_slots,
            known_L=None if plan.num_slots is None else [plan.num_slots] * decision.num_experts,
        )
        return _AtHome(plan, plan.with_filler(x_TD), work)


@dataclass(frozen=True)
class _AtHome:
    """Tokens that stay where they are."""

    plan: SendPlan
    source_SD: Tensor
    work: ExpertWork

    def arrive(self) -> tuple[Tensor, ExpertWork]:
        return self.source_SD, self.work

    def combine(self, y_SD: Tensor, *, dropout: float = 0.0) -> Tensor:
        return self.plan.without_filler(y_SD)
