"""The state of one training run with experts, in one record: ``MoERun``, made once in ``Trainer.__init__``.

Stock calls our seams with a trainer, a task, an optimizer or a model, and passes nothing of ours along. So the
record hangs under one name on the trainer, on its task and on the decoder with the experts; ``run_of`` finds it
there. A trainer of a dense model, and a model that is only evaluated, have none.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fairseq_moe.checkpoint import ShardContent
from fairseq_moe.distributed import ParallelMesh
from fairseq_moe.flags.sharding import Sharding
from fairseq_moe.models.decoder import MoEDecoder

if TYPE_CHECKING:  # the folders whose objects are kept here import this file
    from fairseq_moe.stock.checkpoint.background import BackgroundSave
    from fairseq_moe.stock.checkpoint.named_state import NamedState
    from fairseq_moe.stock.step.guard import StepGuard
    from fairseq_moe.stock.step.profiling import StepProfiler

__all__ = ["MoERun", "begin_run", "end_of_run", "finish_profiles", "note_mesh", "run_of", "split_mesh"]

_ATTRIBUTE = "moe_run"
_MESH = "moe_mesh"  # on a trainer, which asks for its data ranks while it is made, before there is a run


@dataclass(kw_only=True, eq=False)
class MoERun:
    """Record what one rank must remember of a run.

    Args:
        decoder: the decoder with the experts.
        guard: what the ranks agree on at each update, and the flags about failures.
        state: the trainer's tensors and optimizer state by parameter name.
        profiler: of this rank's updates; None: they are not profiled.
        sharding: what torch's ``fully_shard`` shards; None: nothing.
        at_end: called on all ranks when training has ended.
        run_id: names the run in its checkpoints; that of the checkpoint that was loaded, None before the first.
        num_failed_saves: in a row.
        background: the checkpoint that is being written while training goes on.
        background_copy: the tensors of the last one, whose memory the next takes.
    """

    decoder: MoEDecoder
    guard: "StepGuard"
    state: "NamedState"
    at_end: "Callable[[MoERun], None]"
    profiler: "StepProfiler | None" = None
    sharding: Sharding | None = None
    run_id: str | None = None
    num_failed_saves: int = 0
    background: "BackgroundSave | None" = None
    background_copy: ShardContent | None = None

    @property
    def mesh(self) -> ParallelMesh:
        """Get the process groups of the experts."""
        assert self.decoder.mesh is not None
        return self.decoder.mesh

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoERun":
        """Stay one: a copy of the model (an average of its weights, say) belongs to the same run."""
        return self


# In the order in which they began, which is the same on every rank. A run lives as long as its trainer.
_RUNS: "list[weakref.ref[MoERun]]" = []


def begin_run(run: MoERun, trainer: Any, task: Any) -> None:
    """Hang ``run`` where ``run_of`` looks for it."""
    for owner in (trainer, task, run.decoder):
        setattr(owner, _ATTRIBUTE, run)
    _RUNS.append(weakref.ref(run))


def note_mesh(trainer: Any, mesh: ParallelMesh | None) -> None:
    """Hang the process groups of a model with experts on its trainer; None for a dense model."""
    setattr(trainer, _MESH, mesh)


def split_mesh(trainer: Any) -> ParallelMesh | None:
    """Find the process groups of a trainer whose micro-batches are split over ranks; None where they are not."""
    mesh: ParallelMesh | None = getattr(trainer, _MESH, None)
    return None if mesh is None or mesh.num_batch_ranks == 1 else mesh


def run_of(owner: Any) -> MoERun | None:
    """Find the run of a trainer, a task or a decoder; None for those of dense models and of evaluation."""
    run: MoERun | None = getattr(owner, _ATTRIBUTE, None)
    return run


def end_of_run() -> None:
    """Finish what is left of every run of this process when training has ended, on all ranks.

    The caller, ``call_main``, has a configuration and a function, but no trainer.
    """
    for reference in _RUNS:
        run = reference()
        if run is not None:
            run.at_end(run)


def finish_profiles() -> None:
    """Write the profile of every run of this process whose updates are still being profiled."""
    for reference in _RUNS:
        run = reference()
        if run is not None and run.profiler is not None:
            run.profiler.finish()
