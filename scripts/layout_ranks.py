"""Start ranks on this machine's CPU, do one update of a tiny model on each, and hand back its gradients.

The ranks are forks of one server, which has imported fairseq once, and talk over gloo. Ranks that are started take one
job after the other. Nothing waits forever: when a rank raises, dies or is late, all of them are ended, the job has
failed, and the jobs after it get new ranks.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Batch", "Job", "Report", "preload", "run_jobs"]

DEADLINE_SEC = 60.0  # of one job
_GRACE_SEC = 3.0  # what ranks get to report their own end after one has failed, or the deadline has passed
_LOG_TAIL_CHARS = 2000

_VOCABULARY = 40
_FIRST_WORD = 4  # after <s>, <pad>, </s> and <unk>
_FLAGS = f"""
    --task dummy_lm --dict-size {_VOCABULARY} --tokens-per-sample 16 --batch-size 2
    --arch transformer_lm_gpt --share-decoder-input-output-embed --decoder-layers 2 --decoder-embed-dim 8
    --decoder-ffn-embed-dim 12 --decoder-attention-heads 2 --dropout 0 --attention-dropout 0 --seed 3
    --criterion moe_cross_entropy --optimizer sgd --lr 0.5 --lr-scheduler fixed --clip-norm 0
    --cpu --distributed-backend gloo --no-save
"""

_context = multiprocessing.get_context("forkserver")

Batch = tuple[int, int, int]  # of random words: seed, sequences, length


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe one update.

    Args:
        flags: of fairseq, on every rank, after those of the tiny model; the last one of a name counts.
        batches: the micro-batches of each rank.
        is_double: whether the model is made float64; precisions below are asked for by flags.
    """

    flags: tuple[str, ...]
    batches: tuple[tuple[Batch, ...], ...]
    is_double: bool

    @property
    def world_size(self) -> int:
        """Count the ranks."""
        return len(self.batches)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Hold what one rank found in an update.

    Args:
        logged: numbers that stand for all ranks, not rounded.
        gradients: of the parameters that this rank holds or gathers, by name, in the shape of the whole parameter; each
            expert's by itself, with its global number. Under a wrapper that renames them, buffers are there as well.
    """

    logged: dict[str, float]
    gradients: dict[str, Tensor]


def preload() -> None:
    """Let the server from which ranks are forked import all that they need; before the first ``run_jobs``."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the server inherits it; threads do not survive a fork
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # those of what fairseq imports
    _context.set_forkserver_preload(
        ["fairseq.trainer", "fairseq.options", "torch.distributed.fsdp", "fairseq_moe"]
    )


def run_jobs(
    jobs: Sequence[Job], *, prepare: Callable[[], None] | None = None, deadline_sec: float = DEADLINE_SEC
) -> Iterator[list[Report] | str]:
    """Run jobs of one number of ranks one after the other; yield each one's reports in rank order, or why it failed.

    Args:
        jobs: at least one.
        prepare: called on every rank before its first job; it is pickled by name.
        deadline_sec: of each job; the start of the ranks belongs to the first.
    """
    position = 0
    while position < len(jobs):
        ranks = _Ranks(list(jobs[position:]), prepare, deadline_sec)
        try:
            for found in ranks.results():
                position += 1
                yield found
        finally:
            ranks.end()


class _Ranks:
    """Processes that do the same jobs together."""

    def __init__(self, jobs: list[Job], prepare: Callable[[], None] | None, deadline_sec: float) -> None:
        self._num_jobs, self._deadline_sec = len(jobs), deadline_sec
        self._folder = tempfile.TemporaryDirectory(prefix="layout-ranks-")
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(jobs[0].world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_rank_main, args=(rank, jobs, prepare, self._folder.name, theirs, deadline_sec)
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def results(self) -> Iterator[list[Report] | str]:
        """Yield each job's reports; the reason why there are none is the last."""
        for _ in range(self._num_jobs):
            found, failures = self._receive()
            if failures:
                yield "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
                return
            yield [found[rank] for rank in sorted(found)]

    def _receive(self) -> tuple[dict[int, Report], dict[int, str]]:
        found: dict[int, Report] = {}
        failures: dict[int, str] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + self._deadline_sec + _GRACE_SEC  # ranks end themselves before
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = f"was not done after {self._deadline_sec:g} s"
                return found, failures or {rank: self._with_log(rank, late) for rank in waiting.values()}
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    message = pickle.loads(self._connections[rank].recv_bytes())
                except EOFError:
                    message = self._with_log(rank, "died")
                if isinstance(message, Report):
                    found[rank] = message
                else:
                    failures[rank] = message
                    deadline = min(deadline, time.monotonic() + _GRACE_SEC)
        return found, failures

    def _with_log(self, rank: int, text: str) -> str:
        log = Path(self._folder.name, str(rank))
        tail = log.read_text(errors="replace")[-_LOG_TAIL_CHARS:] if log.exists() else ""
        return f"{text}; the end of its output:\n{tail}"

    def end(self) -> None:
        """End the processes, wherever they are."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._folder.cleanup()


def _rank_main(
    rank: int,
    jobs: list[Job],
    prepare: Callable[[], None] | None,
    folder: str,
    connection: Any,
    deadline_sec: float,
) -> NoReturn:
    log = os.open(Path(folder, str(rank)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        faulthandler.dump_traceback_later(deadline_sec, exit=True)
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        world_size = jobs[0].world_size
        if world_size > 1:
            store = dist.FileStore(os.path.join(folder, "store"), world_size)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        for job in jobs:
            message: Report | str = _update(job, rank)
            faulthandler.dump_traceback_later(deadline_sec, exit=True)
            connection.send_bytes(pickle.dumps(message))  # tensors by value, not by shared memory
    except BaseException:
        connection.send_bytes(pickle.dumps(traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    connection.poll(None)  # others may still read from this rank; it is killed, or its parent has ended
    os._exit(0)


def _update(job: Job, rank: int) -> Report:
    """Do one update of a new model on this rank."""
    from fairseq.logging import metrics

    from fairseq_moe.stock.run import run_of

    trainer = _build_trainer(job, rank)
    metrics.reset()
    if trainer.train_step([_make_batch(batch) for batch in job.batches[rank]]) is None:
        raise RuntimeError("the update was skipped")
    meters = metrics.get_meters("train")
    run = run_of(trainer)
    assert run is not None
    experts = list(run.mesh.layout.local_ids(rank))
    buffers = {name for name, _ in trainer.get_model().named_buffers()}
    with _gradients_as_values(run.state):
        tensors = {name: t for name, t in run.state.model_tensors().items() if name not in buffers}
        gradients = dict(_each_expert(tensors, experts))
    logged = {name: float(meter.avg) for name, meter in meters.items() if hasattr(meter, "avg")}
    return Report(logged=logged, gradients=gradients)


def _build_trainer(job: Job, rank: int) -> Any:
    """Build stock's Trainer as fairseq-train does; rank 0 alone composes the configuration, which takes a second."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
    from fairseq.trainer import Trainer

    import fairseq_moe  # noqa: F401
    from fairseq_moe.distributed import broadcast_value

    cfg = None
    if rank == 0:
        argv = [*_FLAGS.split(), *job.flags, "--distributed-world-size", str(job.world_size)]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), argv))
    cfg = broadcast_value(cfg)
    cfg.distributed_training.distributed_rank = rank
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(cfg.common.seed)
    if cfg.distributed_training.ddp_backend == "fully_sharded":
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(task.build_model(cfg.model))
    else:
        model = task.build_model(cfg.model)
    if job.is_double:
        model = model.double()
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def _make_batch(batch: Batch) -> dict[str, Any]:
    """Draw the words of a micro-batch, in the form of fairseq's collater."""
    seed, num_sequences, length = batch
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(_FIRST_WORD, _VOCABULARY, (num_sequences, length + 1), generator=generator)
    lengths = torch.full((num_sequences,), length)
    return {
        "id": torch.arange(num_sequences),
        "nsentences": num_sequences,
        "ntokens": num_sequences * length,
        "net_input": {"src_tokens": words[:, :-1].contiguous(), "src_lengths": lengths},
        "target": words[:, 1:].contiguous(),
    }


@contextmanager
def _gradients_as_values(state: Any) -> Iterator[None]:
    """Put gradients in the place of parameters, so that the run's state gathers them by name as it gathers those."""
    held = dict(state.named_parameters())
    missing = [name for name, parameter in held.items() if parameter.grad is None]
    if missing:
        raise RuntimeError(f"there is no gradient of {', '.join(missing)}")
    values = {name: parameter.data for name, parameter in held.items()}
    for parameter in held.values():
        parameter.data = parameter.grad
    try:
        yield
    finally:
        for name, parameter in held.items():
            parameter.data = values[name]


def _each_expert(tensors: dict[str, Tensor], experts: list[int]) -> Iterator[tuple[str, Tensor]]:
    """List copies of tensors by name, those of experts one by one, with the expert's global number."""
    from fairseq_moe.checkpoint import has_expert_rows

    for name, tensor in tensors.items():
        if not has_expert_rows(name):
            yield name, tensor.detach().clone()
            continue
        for row, expert in zip(tensor, experts, strict=True):
            yield f"{name}[{expert}]", row.detach().clone()
