"""Reading a checkpoint's files for one rank: the main file, and of the shards what this rank's layout needs.

The layout may differ from the writer's. Before that the ranks verify the shards together, each its part. What is
wrong for one rank is wrong for all: they raise the same sentence, which names the newest checkpoint beside it that is
intact.
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
    name_intact,
    newest_intact,
    plain_globals,
    unreadable,
)
from fairseq_moe.checkpoint.groups import hyperparameters
from fairseq_moe.data.dictionary_record import dictionary_problem, recorded_dictionary
from fairseq_moe.distributed import agree, broadcast_value, rank, world_size
from fairseq_moe.errors import CheckpointError
from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.models.fitting import LoadedTensors
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.stock.checkpoint.changes import (
    Resets,
    data_changes,
    model_changes,
    state_changes,
)
from fairseq_moe.stock.checkpoint.mismatch import forget_layout, model_problems, override_new_flags
from fairseq_moe.stock.checkpoint.parts import Parts
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.seam import seam

__all__ = ["TrainerRequest", "reading_for", "resolve_branch", "with_advice"]

logger = logging.getLogger(__name__)


@dataclass
class TrainerRequest:
    """Carry what a loading trainer needs of the file reader, and what the reader leaves for it."""

    cfg: Any
    model: nn.Module
    resets: Resets
    optimizer: dict[str, Any] | None = None
    saved_cfg: Any = None
    run_id: str | None = None
    num_data_ranks: int = 0


# A ContextVar, because stock's loader, through which the trainer reads the file, is told its name alone.
_REQUEST: ContextVar[TrainerRequest | None] = ContextVar("loading_trainer", default=None)


@contextmanager
def reading_for(request: TrainerRequest) -> Iterator[None]:
    """Let the reader know inside which trainer asks, and what it needs."""
    token = _REQUEST.set(request)
    try:
        yield
    finally:
        _REQUEST.reset(token)


def with_advice(sentence: str, path: Path, *, together: bool = True) -> CheckpointError:
    """Make the error that names the newest intact checkpoint beside ``path``; all ranks look and raise together."""
    if together:
        intact = broadcast_value(newest_intact(path.parent) if rank() == 0 else None)
    else:
        intact = newest_intact(path.parent)
    return CheckpointError(sentence + name_intact(intact), agreed=together)


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
    return resolve_branch(stock(filename, suffix, shard_idx, num_shards))


def resolve_branch(filename: str) -> str:
    """Name the shared file where ``filename`` means a checkpoint of the moe branch, else leave it as it is."""
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
            _check_changes(main, state, request)
        request.num_data_ranks = _num_data_ranks(state)
    if checkpoint is None and branch is None:
        return state
    if request is None:
        forget_layout(state["cfg"]["model"])
    override_new_flags(state["cfg"]["model"], arg_overrides or {})
    with _agreed(main, together=load_on_all_ranks):
        if checkpoint is not None:
            _read_shards(checkpoint, state, request)
        elif branch is not None:
            _read_branch(branch, state, request)
    return state


def _num_data_ranks(state: dict[str, Any]) -> int:
    """Count the ranks among which the run that wrote a file divided its data: those of others shared a micro-batch."""
    cfg, args = state.get("cfg"), state.get("args")
    if cfg is not None:
        num_ranks, flags = int(cfg["distributed_training"]["distributed_world_size"]), cfg["model"]
    else:
        num_ranks, flags = int(getattr(args, "distributed_world_size", world_size())), args
    return num_ranks // ParallelConfig.from_args(flags).num_batch_ranks


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
            with_advice(sentence, main, together=together)
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


def _read_shards(checkpoint: Checkpoint, state: dict[str, Any], request: TrainerRequest | None) -> None:
    """Put this rank's tensors into ``state``, and optimizer state by name into the request."""
    with_optimizer = request is not None and not request.resets.optimizer
    ids = _local_ids(checkpoint.manifest.shape.num_experts, request)
    tensors, named = checkpoint.load(
        expert_ids=ids, with_optimizer=with_optimizer, is_wanted=_names_of_stage(request)
    )
    recorded, parts = recorded_dictionary(state), Parts(None if request is None else request.model)
    tensors = {name: parts.cut(name, tensor) for name, tensor in tensors.items()}
    state["model"] = LoadedTensors(tensors, source=str(checkpoint.path), dictionary=recorded)
    groups, state["last_optimizer_state"] = state["last_optimizer_state"], None
    if with_optimizer:
        assert request is not None
        request.run_id = checkpoint.manifest.run_id
        if groups:
            request.optimizer = {**groups, "named": named}


def _names_of_stage(request: TrainerRequest | None) -> Callable[[str], bool]:
    """Choose the names that this rank's stage of a pipeline has; all of them where there is none."""
    decoder = None if request is None else moe_decoder(request.model)
    if request is None or decoder is None or not decoder.stage.is_piped:
        return lambda name: True
    return set(request.model.state_dict()).__contains__


def _read_branch(branch: BranchCheckpoint, state: dict[str, Any], request: TrainerRequest | None) -> None:
    """Put the tensors of the moe branch's files into ``state``, as ``_read_shards`` does those of our own."""
    with_optimizer = request is not None and not request.resets.optimizer
    named = branch.adopt_dense(state, with_optimizer=with_optimizer)
    num_experts = int(state["cfg"]["model"]["moe_expert_count"])
    model, expert_named = branch.experts(
        num_experts=num_experts, expert_ids=_local_ids(num_experts, request), with_optimizer=with_optimizer
    )
    parts = Parts(None if request is None else request.model)
    state["model"].update(model)
    state["model"] = {name: parts.cut(name, tensor) for name, tensor in state["model"].items()}
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


def _local_ids(num_experts: int, request: TrainerRequest | None) -> range:
    decoder = None if request is None else moe_decoder(request.model)
    if decoder is not None and decoder.mesh is not None:
        return decoder.mesh.layout.local_ids(rank())
    return ExpertLayout(num_experts=num_experts, world_size=world_size()).local_ids(rank())


def _check_fits(
    main: Path,
    state: dict[str, Any],
    checkpoint: Checkpoint | None,
    request: TrainerRequest,
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
    parts = Parts(request.model)
    shapes = {name: parts.cut_shape(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    decoder = moe_decoder(request.model)
    recorded = recorded_dictionary(state)
    other = None if decoder is None else dictionary_problem(recorded, decoder.dictionary)
    # With another dictionary, shapes differ for that reason.
    problems = [other] if other else model_problems(saved, request.cfg.model, shapes, request.model)
    if problems:
        raise CheckpointError(f"{main} does not fit this model: {'; '.join(problems)}.")


def _check_changes(main: Path, state: dict[str, Any], request: TrainerRequest) -> None:
    """Refuse flags that have changed since the checkpoint and would be ignored, or move the place in the data."""
    decoder, saved = moe_decoder(request.model), state.get("cfg")
    if decoder is None or saved is None:
        return
    request.saved_cfg, extra = saved, state.get("extra_state", {})
    has_optimizer = state.get("last_optimizer_state") is not None
    problems = [
        *state_changes(saved, request.cfg, resets=request.resets, has_optimizer=has_optimizer),
        *data_changes(
            saved,
            request.cfg,
            batches_done=extra.get("train_iterator", {}).get("iterations_in_epoch", 0),
            resets=request.resets,
        ),
    ]
    if problems:
        raise CheckpointError(f"{main} cannot be continued with these flags: {'; '.join(problems)}.")
    changed = model_changes(saved["model"], request.cfg.model)
    if changed:
        logger.info("Flags of the model that differ from the checkpoint's: %s", ", ".join(changed))
