"""Count the bytes of weights, gradients and optimizer states of a rank: exact for our layouts and precisions."""

from collections.abc import Callable
from dataclasses import dataclass

from fairseq_moe.planner.held import Held, held_by, held_of_kinds
from fairseq_moe.planner.mapping import Mapping, Precision, States
from fairseq_moe.planner.parameters import stage_parts
from fairseq_moe.planner.shape import ModelShape

__all__ = ["StateBytes", "heaviest_rank", "state_bytes"]


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Hold the bytes of a rank's states.

    Args:
        rank: whose they are.
        held: its parameters between updates.
        computed: those it computes with.
        parameters: bytes of its weights between updates.
        gradients: of its gradients, when the optimizer steps.
        optimizer: of float32 copies, their gradients, and the optimizer's own states.
        gathered: while it computes, of weights gathered from shards, and of gradients that are not reduced yet.
    """

    rank: int
    held: Held
    computed: Held
    parameters: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def steady(self) -> int:
        """Bytes that are there from one update to the next."""
        return self.parameters + self.gradients + self.optimizer


def heaviest_rank(mapping: Mapping, pipe: int, count: Callable[[int], int]) -> int:
    """Find the rank of a stage that holds most, among its first rank of each tensor place.

    Parts of a vocabulary may differ by a row, and the first of several shards is never smaller than others.
    """
    first = pipe * mapping.grid.stage_size
    return max(range(first, first + mapping.grid.tensor), key=lambda rank: (count(rank), -rank))


def state_bytes(
    shape: ModelShape, mapping: Mapping, precision: Precision, pipe: int, *, rank: int | None = None
) -> StateBytes:
    """Count the states of a pipeline stage's heaviest rank.

    Args:
        shape: of the model.
        mapping: of the run.
        precision: of each number.
        pipe: number of the stage.
        rank: in place of the heaviest one.
    """
    parts = stage_parts(shape, mapping, pipe)
    if rank is None:
        rank = heaviest_rank(
            mapping, pipe, lambda number: held_by(parts, mapping, number, sharded=True).total
        )
    held = held_by(parts, mapping, rank, sharded=True)
    computed = held_by(parts, mapping, rank, sharded=False)
    gathered = 0
    if mapping.states is not States.COPIED:
        units = [
            (_gathered_numbers(part, mapping), count)
            for part, count in held_of_kinds(parts, mapping, rank, sharded=False)
        ]
        gathered = _gathered_bytes(units, mapping, precision)
    return StateBytes(
        rank=rank,
        held=held,
        computed=computed,
        parameters=held.total * precision.weight,
        gradients=held.trained * precision.grad,
        optimizer=held.trained * precision.optimizer,
        gathered=gathered,
    )


def _gathered_numbers(part: Held, mapping: Mapping) -> Held:
    """Leave out what is not sharded: it is never gathered."""
    is_sharded = mapping.dense_shards > 1
    return Held(
        dense=part.dense if is_sharded else 0,
        expert=part.expert if mapping.expert_shards > 1 else 0,
        frozen=part.frozen if is_sharded else 0,
    )


def _gathered_bytes(units: list[tuple[Held, int]], mapping: Mapping, precision: Precision) -> int:
    """Count what is there at most besides the shards while a rank computes.

    ZeRO-1 holds all weights; the others those of what is around the layers, of the layer at work and of the next one.
    Gradients of micro-batches add up whole where an update has several; else a layer's are there until reduced.

    Args:
        units: numbers of each kind of part and how many there are of it, last of what is around the layers.
        mapping: of the run.
        precision: of each number.
    """
    *layers, (around, _) = units
    everything = few = around
    for unit, count in layers:
        everything += unit * count
    largest = sorted(
        (unit for unit, count in layers for _ in range(min(count, 2))), key=lambda unit: unit.total
    )
    for unit in largest[-2:]:
        few += unit
    weights = everything if mapping.states is States.ZERO_1 else few
    adds_up = mapping.micro_batches > 1 and mapping.states is not States.FAIRSCALE
    grads = everything if adds_up else few
    return weights.total * precision.gathered + grads.trained * min(precision.grad, precision.gathered)
