"""Hold what was planned, and write it as a table or for machines."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fairseq_moe.planner.devices import Device

__all__ = ["Like", "Plan", "Sent", "StagePlan", "StepTime"]

Like = Literal["ours", "megatron"]
_SCHEMA = 1  # raised where a key changes its meaning or goes


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Hold what the fullest rank of a pipeline stage holds, in bytes.

    Args:
        pipe: number of the stage.
        rank: number of that rank, of all.
        layers: decoder layers of the stage, over all of its chunks.
        num_parameters: that the rank holds between updates.
        parameters: weights between updates.
        gradients: when the optimizer steps.
        optimizer: copies and moments.
        gathered: weights and gradients that are whole while it computes.
        activations: kept for backward passes, of all that are under way.
        passes: micro-batches (of one chunk) that are under way at once.
        logits: scores of words, and what the loss makes of them.
        exchange: rows and messages under way.
        margin: what is not modelled: fragments, workspaces, buffers of the communication library, unequal loads.
    """

    pipe: int
    rank: int
    layers: int
    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    passes: int
    logits: int
    exchange: int
    margin: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.states + self.gathered + self.activations + self.logits + self.exchange + self.margin

    @property
    def states(self) -> int:
        """Bytes of weights, gradients and optimizer."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Say what a rank sends along an axis in an update.

    Args:
        axis: of the ranks.
        what: travels.
        sent_bytes: by the rank that sends most.
        crosses_nodes: whether it leaves the node.
        waits: whether nothing can be computed meanwhile.
    """

    axis: str
    what: str
    sent_bytes: int
    crosses_nodes: bool
    waits: bool


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Hold a range of seconds that an update takes.

    Args:
        fast_sec: at the best rates that were measured, with what can overlap hidden.
        slow_sec: at those of whole runs, with nothing hidden.
        compute_frac: share of the slow one that products take.
    """

    fast_sec: float
    slow_sec: float
    compute_frac: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hold what a run would need.

    Args:
        arch: name of the architecture.
        mapping: its axes, by name.
        like: whose numbers these are.
        device: of each rank.
        num_ranks: of the run.
        total_parameters: of the model, each once; blocks that guess further apart.
        active_parameters: of them, those that a token passes.
        stages: what their fullest ranks hold.
        sent: what travels in an update.
        bubble_frac: share of its time that each rank idles.
        flops_per_token: forward and backward, of what is useful.
        hardware_flops_per_token: with what is computed again.
        update_tokens: tokens of an update.
        time: of an update.
        notes: sentences to know.
        changes: what would make it fit, cheapest first; empty where it fits.
    """

    arch: str
    mapping: str
    like: Like
    device: Device
    num_ranks: int
    total_parameters: int
    active_parameters: int
    stages: tuple[StagePlan, ...]
    sent: tuple[Sent, ...]
    bubble_frac: float
    flops_per_token: int
    hardware_flops_per_token: int
    update_tokens: int
    time: StepTime
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Tell whether every rank's device has the memory."""
        return self.peak_bytes <= self.device.memory_bytes

    def table(self) -> str:
        """Write the plan as text."""
        from fairseq_moe.planner.table import table_of

        return table_of(self)

    def as_json(self) -> dict[str, Any]:
        """Give the plan as numbers and text that JSON knows; keys are only ever added within a schema."""
        return {
            "schema": _SCHEMA,
            "arch": self.arch,
            "mapping": self.mapping,
            "like": self.like,
            "device": {
                "name": self.device.name,
                "memory_bytes": self.device.memory_bytes,
                "peak_flops": self.device.peak_flops,
            },
            "num_ranks": self.num_ranks,
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "stages": [_stage_json(stage) for stage in self.stages],
            "sent": [
                {
                    "axis": each.axis,
                    "what": each.what,
                    "bytes_per_update": each.sent_bytes,
                    "crosses_nodes": each.crosses_nodes,
                }
                for each in self.sent
            ],
            "bubble_frac": self.bubble_frac,
            "flops_per_token": self.flops_per_token,
            "hardware_flops_per_token": self.hardware_flops_per_token,
            "update_tokens": self.update_tokens,
            "step_sec": [self.time.fast_sec, self.time.slow_sec],
            "words_per_sec": [
                self.update_tokens / self.time.slow_sec,
                self.update_tokens / self.time.fast_sec,
            ],
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "notes": list(self.notes),
            "changes": list(self.changes),
        }


def _stage_json(stage: StagePlan) -> dict[str, int]:
    return {
        "pipe": stage.pipe,
        "rank": stage.rank,
        "layers": stage.layers,
        "num_parameters": stage.num_parameters,
        "parameters_bytes": stage.parameters,
        "gradients_bytes": stage.gradients,
        "optimizer_bytes": stage.optimizer,
        "gathered_bytes": stage.gathered,
        "activations_bytes": stage.activations,
        "passes_in_flight": stage.passes,
        "logits_bytes": stage.logits,
        "exchange_bytes": stage.exchange,
        "margin_bytes": stage.margin,
        "total_bytes": stage.total,
    }
