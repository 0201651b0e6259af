"""Which updates of this rank are profiled, and what becomes of them: a trace and a table, or a range for nsys."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from fairseq_moe.distributed import rank
from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.profiling import ProfileConfig, nsys_problem

__all__ = ["PROFILE_FOLDER", "StepProfiler", "Tool", "profiled", "profiler_of_run"]

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"  # in the save directory
_NUM_ROWS = 20  # of the table


class Tool(Protocol):
    """Records what this process does between ``start`` and ``stop``."""

    def start(self) -> None:
        """Begin to record what is done."""

    def marked(self, name: str) -> AbstractContextManager[Any]:
        """Make a context that marks what happens inside by a name."""

    def stop(self, updates: range) -> None:
        """End the record, of these updates, and write it."""


class StepProfiler:
    """Start a tool before the first update that is to be profiled, and stop it after the last.

    Args:
        updates: the numbers of those updates, from 1.
        tool: records them.
    """

    def __init__(self, updates: range, tool: Tool) -> None:
        self._updates = updates
        self._tool = tool
        self._first: int | None = None  # while the tool records
        self._last = 0
        self._is_first_seen = True

    def around(self, update: int) -> AbstractContextManager[Any]:
        """Start the tool if this update is to be profiled, and make the context that marks it.

        Args:
            update: number of the update that comes, from 1.
        """
        if self._is_first_seen and update >= self._updates.stop:
            logger.warning("nothing is profiled: training goes on at update %d.", update)
        self._is_first_seen = False
        if update not in self._updates:
            return nullcontext()
        if self._first is None:
            self._first = update
            logger.info("profiling begins at update %d.", update)
            self._tool.start()
        self._last = update
        return self._tool.marked(f"update {update}")

    def after(self, update: int) -> None:
        """Stop the tool if the last update that is to be profiled is done.

        Args:
            update: number of updates done; one that is skipped counts as nothing and is tried again.
        """
        if update >= self._updates[-1]:
            self.finish()

    def finish(self) -> None:
        """Stop the tool if it records, wherever the run is."""
        if self._first is not None:
            updates, self._first = range(self._first, self._last + 1), None
            self._tool.stop(updates)


@contextmanager
def profiled(profiler: StepProfiler | None, trainer: Any) -> Iterator[None]:
    """Profile the update that a trainer makes inside, if this rank profiles that one."""
    if profiler is None:
        yield
        return
    with profiler.around(trainer.get_num_updates() + 1):
        yield
    profiler.after(trainer.get_num_updates())


class TorchTool:
    """Record with torch's profiler: a Chrome trace and a table of the most expensive operations.

    Args:
        folder: of traces.
        on_gpu: kernels are recorded too, and the table is sorted by their time.
    """

    def __init__(self, folder: Path, *, on_gpu: bool) -> None:
        self._folder = folder
        self._on_gpu = on_gpu
        self._profile: Any = None

    def start(self) -> None:
        """Begin to record operations, and kernels on a GPU."""
        kinds = torch.profiler.ProfilerActivity
        self._profile = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if self._on_gpu else [])]
        )
        self._profile.start()

    def marked(self, name: str) -> AbstractContextManager[Any]:
        """Make a context whose name the trace shows."""
        return torch.profiler.record_function(name)

    def stop(self, updates: range) -> None:
        """Write the trace and log the table; a trace that cannot be written ends no run."""
        profile, self._profile = self._profile, None
        span = f"updates {updates[0]} to {updates[-1]} on rank {rank()}"
        # The ending is the one that viewers of torch's traces look for.
        path = self._folder / f"rank-{rank()}.updates-{updates[0]}-{updates[-1]}.pt.trace.json"
        key = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        try:
            profile.stop()
            table = profile.key_averages().table(sort_by=key, row_limit=_NUM_ROWS)
            logger.info("most expensive operations of %s:\n%s", span, table)
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning("the trace could not be written to %s (%s); training goes on.", path, error)
        else:
            logger.info("trace of %s: %s", span, path)


class NsysTool:
    """Mark the range that ``nsys profile --capture-range=cudaProfilerApi`` records."""

    def start(self) -> None:
        """Begin the range, without what the GPU still does of earlier updates."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()

    def marked(self, name: str) -> AbstractContextManager[Any]:
        """Make a context whose name nsys shows."""
        context: AbstractContextManager[Any] = torch.cuda.nvtx.range(name)
        return context

    def stop(self, updates: range) -> None:
        """End the range when the GPU has done its updates; one that has failed ends no run in another way."""
        span = f"updates {updates[0]} to {updates[-1]} on rank {rank()}"
        try:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        except RuntimeError as error:
            logger.warning("the range of %s was not closed for nsys (%s).", span, error)
        else:
            logger.info("marked for nsys: %s.", span)


def profiler_of_run(cfg: Any, *, on_gpu: bool) -> StepProfiler | None:
    """Make the profiler that the flags of a run ask for on this rank; None where they ask for none.

    Args:
        cfg: a whole fairseq configuration, whose flags have been checked.
        on_gpu: the run computes on one.

    Raises:
        ConfigError: nsys is to record a run on CPUs.
    """
    config = ProfileConfig.from_args(cfg.model)
    if config.updates is None:
        return None
    if not on_gpu and not config.use_pytorch_profiler:
        raise ConfigError([nsys_problem()])
    if rank() not in config.ranks:
        return None
    logger.setLevel(logging.INFO)  # stock silences all ranks but the first
    folder = Path(cfg.checkpoint.save_dir) / PROFILE_FOLDER
    tool: Tool = TorchTool(folder, on_gpu=on_gpu) if config.use_pytorch_profiler else NsysTool()
    return StepProfiler(config.updates, tool)
