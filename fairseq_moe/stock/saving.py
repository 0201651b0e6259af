"""Saving MoE models through stock's trainer.

Stock decides on rank 0 which files to write, copies them and deletes old ones. While it does, the other ranks
wait for its word. When it writes a main file, each rank takes a snapshot of its share (``snapshot``) and
writes it as one shard (``_write_share``); when all have succeeded, rank 0 commits the main file (``_commit``).
A save that fails on any rank has failed on all of them: its files are removed, stock deletes nothing, and
training goes on.
"""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils, utils
from torch import nn

from fairseq_moe.checkpoint import (
    ModelShape,
    SetId,
    ShardContent,
    ShardEntry,
    commit_main,
    prune_sets,
    remove_set,
    write_shard,
)
from fairseq_moe.config import MoEConfig
from fairseq_moe.distributed import broadcast_value, gather_values, rank, world_size
from fairseq_moe.errors import CheckpointError
from fairseq_moe.faults import fault
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.reliability import ReliabilityConfig
from fairseq_moe.stock.models import moe_decoder
from fairseq_moe.stock.retention import current_save, saving_together
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.trainer_state import snapshot

__all__ = ["model_shape"]

logger = logging.getLogger(__name__)


class _SaveError(CheckpointError):
    """All ranks know that this checkpoint could not be written, and why."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Rank 0's word to the others: write a set."""

    directory: Path
    set_id: SetId


@dataclass(frozen=True, kw_only=True)
class _Done:
    """Rank 0's last word in a save."""

    failure: str | None


@seam(
    "fairseq.checkpoint_utils:save_checkpoint",
    signature="(cfg, trainer, epoch_itr, val_loss)",
    stock_does="lets rank 0 decide and write alone, and ends the run, or goes on to delete older files, when "
    "a write fails",
    breaks="the tensors of other ranks are lost, old shards are never deleted, and a full disk ends a run or "
    "costs it its last good checkpoint",
    we_do="all ranks write when rank 0 writes a main file, then shards that no main file names are deleted; "
    "a failed save deletes nothing but its own files and is a warning, up to --max-failed-saves in a row",
    test="tests/reliability/test_r03_failed_saves.py",
)
def save_checkpoint(stock: Callable[..., Any], cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
    decoder = moe_decoder(trainer.get_model())
    if decoder is None or cfg.no_save:
        return stock(cfg, trainer, epoch_itr, val_loss)
    fault("save.begin")
    saved = None
    if rank() == 0:
        saved, failure = _lead(stock, cfg, trainer, epoch_itr, val_loss)
    else:
        stock(cfg, trainer, epoch_itr, val_loss)
        failure = _follow(trainer, decoder)
    _count_failures(trainer, failure)
    fault("save.end")
    return saved


def _lead(stock: Callable[..., Any], cfg: Any, *args: Any) -> tuple[str | None, str | None]:
    """Rank 0: let stock save; returns what it returns, or why it could not."""
    noted = dict(vars(checkpoint_utils.save_checkpoint))  # stock keeps the best score on the function itself
    saved = failure = None
    with saving_together() as saving:
        try:
            saved = stock(cfg, *args)
            if saved is not None:
                prune_sets(Path(cfg.save_dir), committed=Path(saved))
        except _SaveError as error:
            failure = str(error)
        except OSError as error:
            done = f"{saving.written} is written, but then " if saving.written else ""
            failure = f"{done}rank 0 met {error}"
    if failure is not None and saving.written is None:
        vars(checkpoint_utils.save_checkpoint).clear()
        vars(checkpoint_utils.save_checkpoint).update(noted)
    broadcast_value(_Done(failure=failure))
    return saved, failure


def _follow(trainer: Any, decoder: MoEDecoder) -> str | None:
    """The other ranks: take part in each save until rank 0 is done; returns why it failed, if it did."""
    while not isinstance(request := broadcast_value(None), _Done):
        try:
            _write_share(snapshot(trainer, decoder), request)
            _agree_on_commit(None)
        except _SaveError:
            logger.debug("rank 0 has met the same error, and says so when it is done")
    return request.failure


def _count_failures(trainer: Any, failure: str | None) -> None:
    if failure is None:
        trainer.moe_failed_saves = 0
        return
    trainer.moe_failed_saves = getattr(trainer, "moe_failed_saves", 0) + 1
    most = ReliabilityConfig.from_args(trainer.cfg.model).max_failed_saves
    sentence = (
        f"the save at update {trainer.get_num_updates()} failed: {failure}; earlier checkpoints are untouched"
    )
    if trainer.moe_failed_saves >= most:
        raise CheckpointError(
            f"{sentence}. This was failure {trainer.moe_failed_saves} in a row (--max-failed-saves {most}), so "
            "the run ends; make room or mend the file system, then start it again.",
            agreed=True,
        )
    if rank() == 0:
        logger.warning(
            "%s. Training goes on (failure %d in a row, --max-failed-saves %d).",
            sentence,
            trainer.moe_failed_saves,
            most,
        )


@seam(
    "fairseq.trainer:Trainer.save_checkpoint",
    signature="(self, filename, extra_state)",
    stock_does="writes one file with the parameters of rank 0, retrying into the same handle after an error",
    breaks="it holds the experts of rank 0 only; a failed write can replace a good file",
    we_do="write one shard per rank, then one main file that names them, each atomically",
    test="tests/reliability/test_r01_killed_saves.py",
)
def trainer_save_checkpoint(
    stock: Callable[..., Any], self: Any, filename: str, extra_state: dict[str, Any]
) -> str | None:
    decoder = moe_decoder(self.get_model())
    if decoder is None:
        return stock(self, filename, extra_state)
    saving = current_save()
    if saving is None and world_size() > 1:
        # Stock writes crash.pt from whichever ranks met the error; a save needs all of them.
        logger.warning("%s is not written: an MoE model is saved by all ranks together.", filename)
        return None
    path = Path(filename).absolute()
    logger.info("Saving checkpoint to %s", path)
    set_id = SetId.new(run_id=getattr(self, "moe_run_id", None), update=self.get_num_updates())
    self.moe_run_id = set_id.run_id
    request = _Request(directory=path.parent, set_id=set_id)
    broadcast_value(request)
    content = snapshot(self, decoder)
    state = _main_state(self)
    state["extra_state"].update(extra_state)
    entries = _write_share(content, request)
    _commit(path, request, state, model_shape(self.cfg.model), entries)
    if saving is not None:
        saving.written = path
    logger.info("Finished saving checkpoint to %s", path)
    return str(path)


def _write_share(content: ShardContent, request: _Request) -> list[ShardEntry]:
    """All ranks: write this rank's shard; returns those of all ranks.

    Raises:
        _SaveError: on every rank, if any could not; then the whole set is gone.
    """
    fault("save.after_snapshot")
    entry = failure = None
    try:
        entry = write_shard(
            request.directory, request.set_id, index=rank(), num_shards=world_size(), content=content
        )
        fault("save.after_shard")
    except (OSError, CheckpointError) as error:
        failure = f"rank {rank()} could not write its shard ({error})"
    written = gather_values((entry, failure))
    _raise_if_any([failure for _, failure in written], request)
    fault("save.agreed")
    return [entry for entry, _ in written]


def _commit(
    path: Path, request: _Request, state: dict[str, Any], shape: ModelShape, entries: list[ShardEntry]
) -> None:
    """Rank 0: write the main file and tell the others how that went."""
    failure = None
    try:
        commit_main(path, state=state, set_id=request.set_id, shape=shape, entries=entries)
    except OSError as error:
        failure = f"rank 0 could not write {path} ({error})"
    _agree_on_commit(failure, request)


def _agree_on_commit(failure: str | None, request: _Request | None = None) -> None:
    """All ranks: whether rank 0 has written the main file."""
    _raise_if_any([broadcast_value(failure)], request)
    fault("save.committed")


def _raise_if_any(failures: list[str | None], request: _Request | None) -> None:
    found = [failure for failure in failures if failure is not None]
    if found:
        if rank() == 0 and request is not None:
            remove_set(request.directory, request.set_id)
        raise _SaveError("; ".join(found), agreed=True)


def model_shape(model_cfg: Any) -> ModelShape:
    """The sizes of a configured model that its checkpoints name."""
    moe = MoEConfig.from_args(model_cfg)
    return ModelShape(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        model_dim=model_cfg.decoder_embed_dim,
        expert_dim=moe.expert_dim or model_cfg.decoder_ffn_embed_dim,
        num_layers=model_cfg.decoder_layers,
    )


def _main_state(trainer: Any) -> dict[str, Any]:
    """Stock's state dictionary, without tensors."""
    optimizer = None
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        stock_form = trainer.optimizer.state_dict()
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in stock_form["param_groups"]
        ]
        optimizer = {"param_groups": groups}
        if "loss_scale" in stock_form:
            optimizer["loss_scale"] = stock_form["loss_scale"]
    trainer._gathered_optim_state = optimizer  # stock puts this into the file in place of its own
    with _shadowed(trainer.model, "state_dict", lambda *args, **kwargs: {}):
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


@seam(
    "fairseq.trainer:Trainer.always_call_state_dict_during_save_checkpoint",
    signature=None,
    stock_does="makes the other ranks gather the sharded state that rank 0 is expected to gather",
    breaks="rank 0 asks for the shares first, and two different collectives wait for each other",
    we_do="an MoE model's state is gathered when rank 0 asks for it",
    test="tests/distributed/test_checkpoint.py",
)
def always_call_state_dict(stock: Callable[..., Any], self: Any) -> bool:
    return stock(self) and moe_decoder(self.get_model()) is None
