"""Loading MoE models through stock's trainer and loaders.

Every rank reads the main file, and of the shards what its own layout needs, which may differ from the
writer's. Before that the ranks verify the shards together, each its part. What is wrong for one rank is wrong
for all: they raise the same sentence, which names the newest checkpoint beside it that is intact.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from fairseq_moe.checkpoint import (
    MANIFEST_KEY,
    UNREADABLE,
    BranchCheckpoint,
    Checkpoint,
    check_records,
    find_branch_checkpoint,
    newest_intact,
    plain_globals,
    unreadable,
)
from fairseq_moe.checkpoint.groups import hyperparameters
from fairseq_moe.distributed import (
    agree,
    broadcast_value,
    data_parallel_size,
    gather_values,
    rank,
    world_size,
)
from fairseq_moe.errors import CheckpointError
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.stock.checkpoint.mismatch import model_problems, override_new_flags
from fairseq_moe.stock.checkpoint.named_state import load_optimizer
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.seam import seam

logger = logging.getLogger(__name__)

_MAX_LISTED = 4


@dataclass
class _TrainerRequest:
    """Carry what a loading trainer needs of the file reader, and what the reader leaves for it."""

    cfg: Any
    model: nn.Module
    with_optimizer: bool
    optimizer: dict[str, Any] | None = None
    run_id: str | None = None
    num_data_ranks: int = 0


# A ContextVar, because stock's loader, through which the trainer reads the file, is told its name alone.
_REQUEST: ContextVar[_TrainerRequest | None] = ContextVar("loading_trainer", default=None)


@seam(
    "fairseq.trainer:Trainer.load_checkpoint",
    signature="(self, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters)",
    stock_does="starts afresh when the file to restore does not exist, hides why a file does not fit, and "
    "loads optimizer state by number",
    breaks="a mistyped --restore-file trains from scratch; numbers differ between backends; on another number "
    "of ranks the data continue at another place",
    we_do="end with a sentence; read experts and optimizer state by name for this rank's layout, and count "
    "the position in the data in its batches",
    test="tests/distributed/test_checkpoint.py",
)
def trainer_load_checkpoint(
    stock: Callable[..., Any],
    self: Any,
    filename: str,
    reset_optimizer: bool = False,
    reset_lr_scheduler: bool = False,
    optimizer_overrides: Any = None,
    reset_meters: bool = False,
) -> Any:
    run = run_of(self)
    filename = _resolve(filename)
    if run is not None:
        filename = _find(filename, self.cfg.checkpoint)
    request = _TrainerRequest(self.cfg, self.get_model(), with_optimizer=not reset_optimizer)
    token = _REQUEST.set(request)
    try:
        extra_state = stock(
            self,
            filename,
            reset_optimizer or run is not None,
            reset_lr_scheduler,
            optimizer_overrides,
            reset_meters,
        )
    finally:
        _REQUEST.reset(token)
    if run is None:
        return extra_state
    if request.optimizer is not None:
        load_optimizer(
            self,
            run.state,
            request.optimizer,
            overrides=optimizer_overrides,
            reset_lr_scheduler=reset_lr_scheduler,
        )
        logger.info("Loaded optimizer state (%d updates)", self.get_num_updates())
    run.run_id = request.run_id
    if extra_state is not None:
        _move_position(extra_state["train_iterator"], request.num_data_ranks, self.data_parallel_world_size)
    return extra_state


def _move_position(position: dict[str, Any], saved_ranks: int, ranks: int) -> None:
    """Recount the position in the data in this run's batches per rank; ranks take turns, so each has done its part.

    Where that is no whole number, the last few batches come again rather than never.
    """
    done = position.get("iterations_in_epoch", 0)
    if saved_ranks != ranks and done > 0:
        position["iterations_in_epoch"] = done * saved_ranks // ranks
        logger.info(
            "The data continues after %d batches of each of %d ranks: batch %d of each of %d ranks",
            done,
            saved_ranks,
            position["iterations_in_epoch"],
            ranks,
        )


def _find(filename: str, cfg: Any) -> str:
    """Find the file to load, on all ranks; a start that would silently be a fresh one is refused."""
    path = Path(filename)
    there = gather_values(path.is_file())
    if all(there):
        return filename
    if any(there):
        without = [other for other, found in enumerate(there) if not found]
        raise CheckpointError(
            f"{filename} exists for some ranks only, not for {without}; make the directory visible to all of "
            "them.",
            agreed=True,
        )
    if cfg.restore_file != "checkpoint_last.pt":
        raise _with_advice(
            f"--restore-file {cfg.restore_file} does not exist (looked for {filename}); correct the path, or "
            "leave the flag out to start afresh.",
            path,
        )
    others = broadcast_value([other.name for other in sorted(path.parent.glob("checkpoint*.pt"))])
    if not others:
        return filename
    intact = broadcast_value(newest_intact(path.parent) if rank() == 0 else None)
    if intact is None or cfg.no_last_checkpoints:
        raise _with_advice(
            f"{filename} does not exist, but there are {', '.join(others[:_MAX_LISTED])} beside it; pass "
            "--restore-file with one of them, or start afresh in another --save-dir.",
            path,
        )
    logger.warning(
        "%s does not exist: the first save must have been interrupted after it had written %s, which is "
        "intact and is loaded instead",
        filename,
        intact,
    )
    return str(intact)


def _with_advice(sentence: str, path: Path, *, together: bool = True) -> CheckpointError:
    """Make the error that names the newest intact checkpoint beside ``path``; all ranks look and raise together."""
    if together:
        intact = broadcast_value(newest_intact(path.parent) if rank() == 0 else None)
    else:
        intact = newest_intact(path.parent)
    if intact is not None:
        sentence += f" The newest intact checkpoint there is {intact}."
    return CheckpointError(sentence, agreed=together)


@seam(
    "fairseq.checkpoint_utils:get_maybe_sharded_checkpoint_filename",
    signature="(filename, suffix, shard_idx, num_shards)",
    stock_does="knows no files of the moe branch",
    breaks="--path checkpoint_last.pt of the branch, whose files are checkpoint_last-shared.pt and "
    "-rank-N.pt, is 'not found'",
    we_do="name the shared file instead",
    test="tests/numerics/test_branch_eval.py",
)
def checkpoint_filename(
    stock: Callable[..., Any], filename: str, suffix: str, shard_idx: int, num_shards: int
) -> str:
    return _resolve(stock(filename, suffix, shard_idx, num_shards))


def _resolve(filename: str) -> str:
    branch = find_branch_checkpoint(Path(filename))
    if branch is not None and (
        not Path(filename).is_file() or (filename.endswith(".pt") and "-rank-" in filename)
    ):
        return str(branch.shared)
    return filename


@seam(
    "fairseq.checkpoint_utils:load_checkpoint_to_cpu",
    signature="(path, arg_overrides, load_on_all_ranks)",
    stock_does="reads one file",
    breaks="one flipped byte loads without a word; the tensors lie in other files, laid out for the ranks that "
    "wrote them",
    we_do="compare checksums (of dense models' files too), verify the shards, each rank its part, and read "
    "what this rank's layout needs, from our format or the branch's; all ranks raise the same error",
    test="tests/distributed/test_checkpoint.py",
)
def load_checkpoint_to_cpu(
    stock: Callable[..., Any], path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False
) -> dict[str, Any]:
    request, main = _REQUEST.get(), Path(path)
    branch = find_branch_checkpoint(main) if "-shared" in main.name else None
    with _agreed(main, together=load_on_all_ranks, advise=True):
        state = _read_main(stock, path, arg_overrides, load_on_all_ranks)
        checkpoint = Checkpoint.from_state(main, state) if MANIFEST_KEY in state else None
        if checkpoint is not None:
            entries = checkpoint.manifest.shards
            checkpoint.verify(entries[rank() :: world_size()] if load_on_all_ranks else entries)
    if request is not None:
        with _agreed(main, together=load_on_all_ranks):
            _check_fits(main, state, checkpoint, request, is_branch=branch is not None)
    if request is not None:
        request.num_data_ranks = _num_data_ranks(state)
    if checkpoint is None and branch is None:
        return state
    override_new_flags(state["cfg"]["model"], arg_overrides or {})
    with _agreed(main, together=load_on_all_ranks):
        if checkpoint is not None:
            _read_shards(checkpoint, state, request)
        elif branch is not None:
            _read_branch(branch, state, request)
    return state


def _num_data_ranks(state: dict[str, Any]) -> int:
    """Count the ranks among which the run that wrote a file divided its data."""
    cfg, args = state.get("cfg"), state.get("args")
    if cfg is not None:
        return int(cfg["distributed_training"]["distributed_world_size"])
    return int(getattr(args, "distributed_world_size", data_parallel_size()))


@contextmanager
def _agreed(main: Path, *, together: bool, advise: bool = False) -> Iterator[None]:
    """Turn what is wrong for one rank inside into an error of all ranks, in the same words.

    Args:
        main: the main file that is being read.
        together: all ranks are here.
        advise: name the newest intact checkpoint.
    """
    failure = None
    try:
        yield
    except CheckpointError as error:
        failure = str(error)
    failures = agree(failure) if together else [failure] if failure is not None else []
    if failures:
        sentence = " ".join(dict.fromkeys(failures))
        raise (
            _with_advice(sentence, main, together=together)
            if advise
            else CheckpointError(sentence, agreed=together)
        )


def _read_main(
    stock: Callable[..., Any], path: str, arg_overrides: Any, load_on_all_ranks: bool
) -> dict[str, Any]:
    try:
        check_records(Path(path))
        with plain_globals():
            return stock(path, arg_overrides, load_on_all_ranks)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _read_shards(checkpoint: Checkpoint, state: dict[str, Any], request: _TrainerRequest | None) -> None:
    """Put this rank's tensors into ``state``, and optimizer state by name into the request."""
    with_optimizer = request is not None and request.with_optimizer
    ids = _local_ids(checkpoint.manifest.shape.num_experts, request)
    state["model"], named = checkpoint.load(expert_ids=ids, with_optimizer=with_optimizer)
    groups, state["last_optimizer_state"] = state["last_optimizer_state"], None
    if with_optimizer:
        assert request is not None
        request.run_id = checkpoint.manifest.run_id
        if groups:
            request.optimizer = {**groups, "named": named}


def _read_branch(branch: BranchCheckpoint, state: dict[str, Any], request: _TrainerRequest | None) -> None:
    """Put the tensors of the moe branch's files into ``state``, as ``_read_shards`` does those of our own."""
    with_optimizer = request is not None and request.with_optimizer
    named = branch.adopt_dense(state, with_optimizer=with_optimizer)
    num_experts = int(state["cfg"]["model"]["moe_expert_count"])
    model, expert_named = branch.experts(
        num_experts=num_experts, expert_ids=_local_ids(num_experts, request), with_optimizer=with_optimizer
    )
    state["model"].update(model)
    saved, state["last_optimizer_state"] = state.get("last_optimizer_state"), None
    if not named:
        return
    assert request is not None
    assert saved is not None
    request.optimizer = {
        "named": {**named, **expert_named},
        "param_groups": hyperparameters(saved["param_groups"]),
    }
    if "loss_scale" in saved:
        request.optimizer["loss_scale"] = saved["loss_scale"]


def _local_ids(num_experts: int, request: _TrainerRequest | None) -> range:
    decoder = None if request is None else moe_decoder(request.model)
    if decoder is not None and decoder.mesh is not None:
        return decoder.mesh.layout.local_ids(rank())
    return ExpertLayout(num_experts=num_experts, world_size=world_size()).local_ids(rank())


def _check_fits(
    main: Path,
    state: dict[str, Any],
    checkpoint: Checkpoint | None,
    request: _TrainerRequest,
    *,
    is_branch: bool,
) -> None:
    if checkpoint is None and not is_branch and moe_decoder(request.model) is None:
        return
    saved = state["cfg"]["model"] if state.get("cfg") is not None else {}
    if OmegaConf.is_config(saved):
        saved = OmegaConf.to_container(saved)
    tensors = state["model"]
    if checkpoint is not None:
        ids = _local_ids(checkpoint.manifest.shape.num_experts, request)
        tensors = checkpoint.content(expert_ids=ids, with_optimizer=False).model
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = model_problems(saved, request.cfg.model, shapes, request.model)
    if problems:
        raise CheckpointError(f"{main} does not fit this model: {'; '.join(problems)}.")
