"""In which order pipeline ranks compute and exchange micro-batches: tables of whole numbers, for any P, V, m.

P pipeline ranks hold V chunks of layers each (``parallel.stages``); an update has m micro-batches. ``actions`` is what
one rank computes. V = 1: one forward, one backward (1F1B). V > 1: interleaved, as in Megatron-LM (Narayanan et al.
2021, arXiv 2104.04473): groups of P micro-batches go through the chunks one after the other.

``lowered`` adds what is sent and received. NCCL ignores tags and may let a send wait for its receive, so order is all
there is: were each rank to receive right before use and to send right after computing, it would block wherever there
are two micro-batches. Here all ranks' steps are written in ONE global order, in which a transfer is a single event of
both partners, and each rank's list is what concerns it. So each pair sees its messages in the same order on both
sides, and nothing blocks even if every step waits for its partner: of all steps not yet done, the first in the global
order always can be.

That order is of the moments at which passes would *end*, each transfer right after the pass that makes it. So a
receive stands before whatever its rank computes while the message comes into being, and can be posted before that.
The moments count a little time for transfers: without it, passes that end together on neighbouring ranks make
transfers wait for one another. With transfers that take a quarter of a forward pass, on one channel per rank, P = V = 4
and m = 16 take 208.5 forward passes of a chunk; 272 without that time, 238 with passes sorted by their start.

A zero-bubble schedule (backward split in two: gradients of inputs at once, of weights where ranks would idle) is left
out. With P = 4 it takes 27 instead of 33 units of time at m = 8, 51 instead of 57 at m = 16; interleaving with V = 4
takes 26.25 and 50.25. It needs two backward passes through each layer, and activations and output gradients kept from
the one to the other, of P micro-batches on every rank (1F1B's last rank keeps one's); recomputation and FSDP would
make, gather and reduce everything twice, or keep what they are there not to keep.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = [
    "Action",
    "Kind",
    "Recv",
    "Send",
    "Step",
    "actions",
    "bubble_frac",
    "forward_actions",
    "lowered",
    "lowered_forward",
    "peak_activations",
    "with_dummies",
]

# F: a forward pass, or an activation that is its output. B: a backward pass, or a gradient of an activation.
Kind = Literal["F", "B"]
# How long passes and transfers take in the order of ``lowered``; any transfer time from 1 to 2 gives good orders.
_COST: dict[Kind, int] = {"F": 4, "B": 8}
_TRANSFER = 1


@dataclass(frozen=True, slots=True)
class Action:
    """Computes a forward or backward pass of one micro-batch through one chunk of this rank's layers."""

    kind: Kind
    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class _Transfer:
    """Names a message; boundary b lies between stages b and b + 1, ``chunk`` is the one of this rank beside it."""

    kind: Kind
    micro_batch: int
    chunk: int
    boundary: int
    peer: int


class Send(_Transfer):
    """Sends what ``chunk`` has computed to pipeline rank ``peer``: its output (F) or its input's gradient (B)."""

    __slots__ = ()


class Recv(_Transfer):
    """Receives what ``chunk`` needs from pipeline rank ``peer``: its input (F) or its output's gradient (B)."""

    __slots__ = ()


Step = Action | Send | Recv


def with_dummies(pipe: int, virtual: int, num_micro_batches: int) -> int:
    """Count the micro-batches that a schedule runs: with V > 1 the next multiple of P, filled up with dummies."""
    return -(-num_micro_batches // pipe) * pipe if virtual > 1 else num_micro_batches


def _warm_up(pipe: int, virtual: int, num_micro_batches: int, rank: int) -> int:
    """Count the forward passes before the first one that a backward pass follows."""
    steps = pipe - rank - 1
    if virtual > 1:
        steps = 2 * steps + (virtual - 1) * pipe
    return min(steps, num_micro_batches * virtual)


def actions(pipe: int, virtual: int, num_micro_batches: int, rank: int) -> list[Action]:
    """List the passes that pipeline rank ``rank`` computes for an update, in their order.

    Raises:
        ValueError: V > 1 and P = 1, or ``num_micro_batches`` is not a multiple of P (``with_dummies`` makes it one).
    """
    if num_micro_batches != with_dummies(pipe, virtual, num_micro_batches):
        raise ValueError(f"{num_micro_batches} micro-batches, expected a multiple of {pipe} with V {virtual}")
    forward = list(_passes("F", pipe, virtual, num_micro_batches))
    backward = list(_passes("B", pipe, virtual, num_micro_batches))
    warm_up = _warm_up(pipe, virtual, num_micro_batches, rank)
    steady = [action for pair in zip(forward[warm_up:], backward, strict=False) for action in pair]
    return forward[:warm_up] + steady + backward[len(forward) - warm_up :]


def forward_actions(pipe: int, virtual: int, num_micro_batches: int) -> list[Action]:
    """List the passes that every pipeline rank computes where there is no backward pass; any number will do."""
    return list(_passes("F", pipe, virtual, num_micro_batches))


def _passes(kind: Kind, pipe: int, virtual: int, num_micro_batches: int) -> Iterator[Action]:
    """Yield a rank's passes of one kind: each group of P micro-batches chunk by chunk, backward from the last chunk."""
    if pipe == 1 and virtual > 1:
        raise ValueError(f"V is {virtual} with P = 1, expected several pipeline ranks")
    chunks = range(virtual) if kind == "F" else range(virtual - 1, -1, -1)
    for start in range(0, num_micro_batches, pipe):
        for chunk in chunks:
            for micro_batch in range(start, min(start + pipe, num_micro_batches)):
                yield Action(kind, micro_batch, chunk)


def peak_activations(pipe: int, virtual: int, num_micro_batches: int, rank: int) -> int:
    """Count the passes (of one micro-batch through one chunk) whose activations ``rank`` holds at once, at most.

    1F1B: P - p; interleaved: 2 (P - p - 1) + (V - 1) P + 1, each of a V-th of the rank's layers; never more than there
    are. On top come messages that are awaited or not used yet: at most 2 with 1F1B, 4 interleaved.
    """
    warm_up = _warm_up(pipe, virtual, num_micro_batches, rank)
    return min(warm_up + 1, num_micro_batches * virtual)


def bubble_frac(pipe: int, virtual: int, num_micro_batches: int) -> Fraction:
    """Give the share of its time that each rank idles: (P - 1) / (V m + P - 1), if all stages take equally long."""
    return Fraction(pipe - 1, virtual * num_micro_batches + pipe - 1)


@functools.lru_cache(maxsize=8)  # asked for at every update
def lowered(pipe: int, virtual: int, num_micro_batches: int) -> list[list[Step]]:
    """List for each pipeline rank what it computes, sends and receives in an update; the module says in which order.

    Whoever executes a list may post a receive without waiting (``irecv``) and wait right before the pass that uses it,
    and may post a send likewise (``isend``) and wait at the end of the list; its tensor lives until then. All
    transfers must be *posted* in the list's order, passes computed in it. With V > 1 the last rank's output of chunk v
    goes to rank 0 as the input of chunk v + 1.

    Raises:
        ValueError: as ``actions``.
    """
    return _merged(pipe, virtual, [actions(pipe, virtual, num_micro_batches, rank) for rank in range(pipe)])


@functools.lru_cache(maxsize=8)
def lowered_forward(pipe: int, virtual: int, num_micro_batches: int) -> list[list[Step]]:
    """List for each pipeline rank the steps of forward passes alone, as ``lowered``; any number of micro-batches."""
    return _merged(pipe, virtual, [forward_actions(pipe, virtual, num_micro_batches)] * pipe)


def _merged(pipe: int, virtual: int, orders: list[list[Action]]) -> list[list[Step]]:
    steps: list[list[Step]] = [[] for _ in orders]
    for rank, action in _by_end(pipe, virtual, orders):
        steps[rank].append(action)
        stage = action.chunk * pipe + rank
        to = stage + 1 if action.kind == "F" else stage - 1
        if 0 <= to < pipe * virtual:
            chunk, peer = divmod(to, pipe)
            boundary = min(stage, to)
            steps[rank].append(Send(action.kind, action.micro_batch, action.chunk, boundary, peer))
            steps[peer].append(Recv(action.kind, action.micro_batch, chunk, boundary, rank))
    return steps


def _by_end(pipe: int, virtual: int, orders: list[list[Action]]) -> list[tuple[int, Action]]:
    """Sort all ranks' passes by when they end, if each starts as soon as its rank is free and its input there."""
    last = pipe * virtual - 1
    ends: dict[tuple[Kind, int, int], int] = {}  # kind, micro-batch, stage
    done = [0] * pipe
    free = [0] * pipe
    found: list[tuple[int, int, Action]] = []
    while len(found) < sum(map(len, orders)):
        before = len(found)
        for rank, order in enumerate(orders):
            while done[rank] < len(order):
                action = order[done[rank]]
                stage = action.chunk * pipe + rank
                start = _input_at(ends, action, stage, last)
                if start is None:
                    break
                free[rank] = max(free[rank], start) + _COST[action.kind]
                ends[action.kind, action.micro_batch, stage] = free[rank]
                found.append((free[rank], rank, action))
                done[rank] += 1
        assert len(found) > before, "the ranks' orders wait for one another"
    found.sort(key=lambda entry: entry[:2])
    return [(rank, action) for _, rank, action in found]


def _input_at(ends: dict[tuple[Kind, int, int], int], action: Action, stage: int, last: int) -> int | None:
    """Find when a pass has what it needs; None: the pass that makes it has not been timed yet."""
    if action.kind == "F" and stage == 0:
        return 0
    if action.kind == "B" and stage == last:
        return ends.get(("F", action.micro_batch, stage))
    made = ends.get((action.kind, action.micro_batch, stage - 1 if action.kind == "F" else stage + 1))
    return None if made is None else made + _TRANSFER
