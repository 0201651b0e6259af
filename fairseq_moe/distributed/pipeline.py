"""Execute one rank's list of a pipeline schedule: compute, send and receive, in the order that the list gives.

``parallel.schedule`` has made the lists so that nothing blocks even if each transfer waits for its partner. Receives
are posted early and waited for where they are used, sends a few messages later: what is sent is kept until then.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from fairseq_moe.distributed.collectives import collective_timeout
from fairseq_moe.distributed.mesh import ParallelMesh
from fairseq_moe.parallel.schedule import Action, Kind, Recv, Step

__all__ = ["StageWork", "run_steps"]

# Tensors that are sent and not waited for. A receive is posted at most one pass after its send, so these have arrived.
_MOST_UNDER_WAY = 8

_Key = tuple[Kind, int, int]  # kind, micro-batch, chunk


class StageWork(Protocol):
    """Compute the passes of one rank's chunks."""

    def buffers(self, step: Recv) -> list[Tensor]:
        """Make the tensors that a message fills: its shapes follow from this rank's own copy of the batch."""
        ...

    def compute(self, action: Action, received: list[Tensor] | None) -> Sequence[Tensor]:
        """Compute one pass from what was received for it; returns what is sent, nothing at an end of the pipeline."""
        ...


def run_steps(steps: Iterable[Step], work: StageWork, mesh: ParallelMesh) -> None:
    """Execute a rank's steps.

    Args:
        steps: of this rank, from ``lowered`` or ``lowered_forward``.
        work: computes.
        mesh: tells which rank holds the same parts of another stage.
    """
    coming: dict[_Key, tuple[list[Tensor], list[Any]]] = {}
    outgoing: dict[_Key, Sequence[Tensor]] = {}
    under_way: deque[tuple[Any, Tensor]] = deque()
    for step in steps:
        key = step.kind, step.micro_batch, step.chunk
        if isinstance(step, Action):
            received = None
            if key in coming:
                received, waits = coming.pop(key)
                for transfer in waits:
                    _wait(transfer)
            outgoing[key] = work.compute(step, received)
            continue
        peer = mesh.rank_of_stage(step.peer)
        if isinstance(step, Recv):
            buffers = work.buffers(step)
            coming[key] = buffers, [dist.irecv(tensor, src=peer) for tensor in buffers]
        else:
            tensors = [tensor.contiguous() for tensor in outgoing.pop(key)]
            under_way.extend((dist.isend(tensor, dst=peer), tensor) for tensor in tensors)
            del tensors
            _finish(under_way, _MOST_UNDER_WAY)
    _finish(under_way, 0)


def _finish(under_way: deque[tuple[Any, Tensor]], num_left: int) -> None:
    """Wait for all but the last sends; what they carry is kept alive until then."""
    while len(under_way) > num_left:
        transfer, _ = under_way.popleft()
        _wait(transfer)


def _wait(transfer: Any) -> None:
    """Wait for a transfer no longer than for a collective: gloo's transfers keep the group's first timeout."""
    if dist.get_backend() == "gloo":
        transfer.wait(collective_timeout())
    else:
        transfer.wait()
