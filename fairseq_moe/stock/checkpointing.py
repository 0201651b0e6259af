"""Saving and loading MoE models through stock's trainer and loaders.

Saving: stock decides on rank 0 which files to write. While it does, the other ranks wait for its word; when
it
writes a main file, all ranks write their expert shards first. Stock's copies (``checkpoint_last.pt``,
``_best``) name
the same shards.

Loading: every rank reads the main file and the experts of its own layout, which may differ from the writer's.
"""

import logging
import os
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq import utils
from omegaconf import OmegaConf
from torch import nn

from fairseq_moe.checkpoint import (
    MANIFEST_KEY,
    UNREADABLE,
    Manifest,
    ShardEntry,
    find_branch_checkpoint,
    plain_globals,
    prune_sets,
    read_experts,
    unreadable,
    write_plain,
    write_shard,
)
from fairseq_moe.checkpoint.sets import ExpertState
from fairseq_moe.distributed import agree, broadcast_value, gather_values, rank, world_size
from fairseq_moe.errors import CheckpointError
from fairseq_moe.layout import ExpertLayout
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.stock.mismatch import model_problems, override_new_flags
from fairseq_moe.stock.models import moe_decoder
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.trainer_state import load_optimizer, model_state, named_optimizer

logger = logging.getLogger(__name__)


# --- saving
# ---------------------------------------------------------------------------------------------------


@seam(
    "fairseq.checkpoint_utils:save_checkpoint",
    signature="(cfg, trainer, epoch_itr, val_loss)",
    stock_does="lets rank 0 decide and write alone",
    breaks="the experts of other ranks are lost; old expert files are never deleted",
    we_do="the other ranks write their experts when rank 0 writes a main file; then sets that no main file "
    "names are deleted",
    test="tests/distributed/test_checkpoint.py",
)
def save_checkpoint(stock: Callable[..., Any], cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
    decoder = moe_decoder(trainer.get_model())
    if decoder is None or cfg.no_save:
        return stock(cfg, trainer, epoch_itr, val_loss)
    if rank() > 0:
        stock(cfg, trainer, epoch_itr, val_loss)
        _follow_rank_0(trainer, decoder)
        return None
    trainer.moe_saves_together = True
    try:
        saved = stock(cfg, trainer, epoch_itr, val_loss)
    finally:
        trainer.moe_saves_together = False
        broadcast_value(None)
    if saved is not None:
        prune_sets(Path(cfg.save_dir))
    return saved


@seam(
    "fairseq.trainer:Trainer.always_call_state_dict_during_save_checkpoint",
    signature=None,
    stock_does="makes the other ranks gather the sharded state that rank 0 is expected to gather",
    breaks="rank 0 asks for the experts first, and two different collectives wait for each other",
    we_do="an MoE model's state is gathered when rank 0 asks for it",
    test="tests/distributed/test_checkpoint.py",
)
def always_call_state_dict(stock: Callable[..., Any], self: Any) -> bool:
    return stock(self) and moe_decoder(self.get_model()) is None


def _follow_rank_0(trainer: Any, decoder: MoEDecoder) -> None:
    """Write this rank's experts each time rank 0 asks, until it says that it is done."""
    failure = None
    while (request := broadcast_value(None)) is not None:
        try:
            _write_set(trainer, decoder, *request)
        except CheckpointError as error:  # agreed: rank 0 met it too and is about to say that it is done
            failure = error
    if failure is not None:
        raise failure


@seam(
    "fairseq.trainer:Trainer.save_checkpoint",
    signature="(self, filename, extra_state)",
    stock_does="writes one file with the parameters of rank 0, retrying into the same handle after an error",
    breaks="it holds the experts of rank 0 only; a failed write can replace a good file",
    we_do="write the expert shards of all ranks, then one main file that names them, each atomically",
    test="tests/distributed/test_checkpoint.py",
)
def trainer_save_checkpoint(
    stock: Callable[..., Any], self: Any, filename: str, extra_state: dict[str, Any]
) -> str | None:
    decoder = moe_decoder(self.get_model())
    if decoder is None:
        return stock(self, filename, extra_state)
    if not getattr(self, "moe_saves_together", False) and world_size() > 1:
        # Stock writes crash.pt from whichever ranks met the error; a save needs all of them.
        logger.warning("%s is not written: an MoE model is saved by all ranks together.", filename)
        return None
    path = Path(filename).absolute()
    logger.info("Saving checkpoint to %s", path)
    request = (str(path.parent), f"{self.get_num_updates()}-{os.urandom(4).hex()}")
    broadcast_value(request)
    shards, dense, named = _write_set(self, decoder, *request)
    manifest = Manifest(update=self.get_num_updates(), num_experts=decoder.moe.num_experts, shards=shards)
    state = _main_state(self, dense, named)
    state["extra_state"].update(extra_state)
    state[MANIFEST_KEY] = manifest.to_dict()
    write_plain(path, state)
    logger.info("Finished saving checkpoint to %s", path)
    return str(path)


def _write_set(
    trainer: Any, decoder: MoEDecoder, directory: str, set_name: str
) -> tuple[list[ShardEntry], dict[str, Any], dict[str, Any]]:
    """All ranks: write this rank's experts if it owns them; returns all entries and the dense state."""
    assert decoder.mesh is not None
    layout = decoder.mesh.layout
    model, optimizer = model_state(trainer), named_optimizer(trainer)
    experts: ExpertState = (_pick(model, experts=True), _pick(optimizer, experts=True))
    entry = failure = None
    if layout.is_owner(rank()):
        try:
            entry = write_shard(
                Path(directory),
                set_name,
                index=rank(),
                num_shards=layout.ep_size,
                expert_ids=layout.local_ids(rank()),
                state=experts,
            )
        except OSError as error:
            failure = f"rank {rank()} could not write its experts to {directory} ({error})"
    failures = agree(failure)
    if failures:
        raise CheckpointError("; ".join(failures) + "; earlier checkpoints are untouched.", agreed=True)
    entries = [entry for entry in gather_values(entry) if entry is not None]
    return entries, _pick(model, experts=False), _pick(optimizer, experts=False)


def _pick(by_name: dict[str, Any], *, experts: bool) -> dict[str, Any]:
    return {name: value for name, value in by_name.items() if (".moe_layer.experts." in name) is experts}


def _main_state(trainer: Any, dense: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Stock's state dictionary around the dense part."""
    optimizer = None
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        stock_form = trainer.optimizer.state_dict()
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in stock_form["param_groups"]
        ]
        optimizer = {"named": named, "param_groups": groups}
        if "loss_scale" in stock_form:
            optimizer["loss_scale"] = stock_form["loss_scale"]
    trainer._gathered_optim_state = optimizer  # stock puts this into the file in place of its own
    with _shadowed(trainer.model, "state_dict", lambda *args, **kwargs: dense):
        state = trainer.state_dict()
    state.pop("fsdp_metadata", None)
    if optimizer is None:
        state["last_optimizer_state"] = None
    return utils.move_to_cpu(state)


@contextmanager
def _shadowed(module: nn.Module, name: str, value: Any) -> Any:
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]


# --- loading
# --------------------------------------------------------------------------------------------------


@dataclass
class _TrainerRequest:
    """What the trainer that is loading needs of the file reader, and what the reader leaves for it."""

    cfg: Any
    model: nn.Module
    with_optimizer: bool
    optimizer: dict[str, Any] | None = None
    expert_optimizer: dict[str, Any] = field(default_factory=dict)


_REQUEST: ContextVar[_TrainerRequest | None] = ContextVar("loading_trainer", default=None)


@seam(
    "fairseq.trainer:Trainer.load_checkpoint",
    signature="(self, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters)",
    stock_does="starts afresh when the file to restore does not exist, hides why a file does not fit, and "
    "loads optimizer state by number",
    breaks="a mistyped --restore-file trains from scratch; numbers differ between backends",
    we_do="end with a sentence; read experts and optimizer state by name for this rank's layout",
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
    is_moe = moe_decoder(self.get_model()) is not None
    filename = _resolve(filename)
    exists = Path(filename).is_file()
    if is_moe and len(set(gather_values(exists))) > 1:
        raise CheckpointError(
            f"{filename} exists for some ranks only; make the directory visible to all of them.", agreed=True
        )
    if is_moe and not exists and self.cfg.checkpoint.restore_file != "checkpoint_last.pt":
        raise CheckpointError(
            f"--restore-file {self.cfg.checkpoint.restore_file} does not exist (looked for {filename}); "
            "correct the path, or leave the flag out to start afresh.",
            agreed=True,
        )
    request = _TrainerRequest(self.cfg, self.get_model(), with_optimizer=not reset_optimizer)
    token = _REQUEST.set(request)
    try:
        extra_state = stock(
            self, filename, reset_optimizer or is_moe, reset_lr_scheduler, optimizer_overrides, reset_meters
        )
    finally:
        _REQUEST.reset(token)
    if request.optimizer is not None:
        load_optimizer(
            self, request.optimizer, overrides=optimizer_overrides, reset_lr_scheduler=reset_lr_scheduler
        )
        logger.info("Loaded optimizer state (%d updates)", self.get_num_updates())
    return extra_state


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
    breaks="the experts lie in other files, laid out for the ranks that wrote them",
    we_do="add the experts of this rank's layout, from our format or the branch's",
    test="tests/distributed/test_checkpoint.py",
)
def load_checkpoint_to_cpu(
    stock: Callable[..., Any], path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False
) -> dict[str, Any]:
    request = _REQUEST.get()
    try:
        state = _read(stock, path, arg_overrides, load_on_all_ranks, request)
        failure = None
    except CheckpointError as error:
        failure = error
    if load_on_all_ranks:
        failures = agree(None if failure is None else str(failure))
        if failures:
            raise CheckpointError(" ".join(dict.fromkeys(failures)), agreed=True)
    elif failure is not None:
        raise failure
    return state


def _read(
    stock: Callable[..., Any],
    path: str,
    arg_overrides: Any,
    load_on_all_ranks: bool,
    request: _TrainerRequest | None,
) -> dict[str, Any]:
    with_optimizer = request is not None and request.with_optimizer
    branch = find_branch_checkpoint(Path(path)) if "-shared" in Path(path).name else None
    try:
        with plain_globals():
            state = stock(path, arg_overrides, load_on_all_ranks)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    is_moe = MANIFEST_KEY in state or branch is not None
    if request is not None and (is_moe or moe_decoder(request.model) is not None):
        _check_fits(path, state, request)
    if not is_moe:
        return state
    override_new_flags(state["cfg"]["model"], arg_overrides or {})
    optimizer = state.get("last_optimizer_state")
    if branch is not None:
        experts, optimizer = _read_branch(branch, state, request)
    else:
        manifest = Manifest.from_dict(state.pop(MANIFEST_KEY), source=Path(path))
        experts = read_experts(
            Path(path).parent,
            manifest,
            expert_ids=_local_ids(manifest.num_experts, request),
            with_optimizer=with_optimizer,
        )
    state["model"].update(experts[0])
    state["last_optimizer_state"] = None
    if with_optimizer and optimizer:
        assert request is not None
        request.optimizer = {**optimizer, "named": {**optimizer["named"], **experts[1]}}
    return state


def _read_branch(
    branch: Any, state: dict[str, Any], request: _TrainerRequest | None
) -> tuple[ExpertState, dict[str, Any] | None]:
    with_optimizer = request is not None and request.with_optimizer
    named = branch.adopt_dense(state, with_optimizer=with_optimizer)
    num_experts = int(state["cfg"]["model"]["moe_expert_count"])
    experts = branch.experts(
        num_experts=num_experts, expert_ids=_local_ids(num_experts, request), with_optimizer=with_optimizer
    )
    if not named:
        return experts, None
    saved = state["last_optimizer_state"]
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]
    ]
    optimizer = {"named": named, "param_groups": groups}
    if "loss_scale" in saved:
        optimizer["loss_scale"] = saved["loss_scale"]
    return experts, optimizer


def _local_ids(num_experts: int, request: _TrainerRequest | None) -> range:
    decoder = None if request is None else moe_decoder(request.model)
    if decoder is not None and decoder.mesh is not None:
        return decoder.mesh.layout.local_ids(rank())
    return ExpertLayout(num_experts=num_experts, world_size=world_size()).local_ids(rank())


def _check_fits(path: str, state: dict[str, Any], request: _TrainerRequest) -> None:
    saved = state["cfg"]["model"] if state.get("cfg") is not None else {}
    if OmegaConf.is_config(saved):
        saved = OmegaConf.to_container(saved)
    problems = model_problems(saved, request.cfg.model, state["model"], request.model)
    if problems:
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(problems)}.")
