"""Saving MoE models through stock's trainer.

Stock decides on rank 0 which files to write, copies them and deletes old ones. While it does, the other ranks
wait for its word. When it writes a main file, each rank takes a snapshot of its share (``snapshot``) and
writes it as one shard (``write_share``); when all have succeeded, rank 0 commits the main file
(``commit_together``). A save that fails on any rank has failed on all of them: its files are removed, stock deletes
nothing, and training goes on. With --save-in-background the last two steps come later: see ``background``.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils

from fairseq_moe.checkpoint import (
    SetId,
    ShardContent,
    ShardEntry,
    commit_main,
    copy_atomically,
    prune_sets,
)
from fairseq_moe.distributed import broadcast_value, rank, world_size
from fairseq_moe.errors import CheckpointError
from fairseq_moe.faults import fault
from fairseq_moe.stock.checkpoint.background import BackgroundSave, Commit
from fairseq_moe.stock.checkpoint.main_state import main_state, model_shape
from fairseq_moe.stock.checkpoint.named_state import snapshot
from fairseq_moe.stock.checkpoint.retention import current_save, saving_together
from fairseq_moe.stock.checkpoint.writing import (
    Done,
    Request,
    SaveError,
    agree_on_commit,
    agree_on_shards,
    commit_together,
    write_share,
)
from fairseq_moe.stock.run import MoERun, run_of
from fairseq_moe.stock.seam import seam

__all__ = ["finish_background_save", "note_background_save"]

logger = logging.getLogger(__name__)


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
    run = run_of(trainer)
    if run is None or cfg.no_save:
        return stock(cfg, trainer, epoch_itr, val_loss)
    finish_background_save(run)
    fault("save.begin")
    saved = None
    if rank() == 0:
        saved, failure = _lead(stock, cfg, trainer, epoch_itr, val_loss)
    else:
        stock(cfg, trainer, epoch_itr, val_loss)
        failure = _follow(trainer, run)
    _count_failures(run, failure, update=trainer.get_num_updates())
    fault("save.end")
    return saved


def _lead(stock: Callable[..., Any], cfg: Any, *args: Any) -> tuple[str | None, str | None]:
    """Let stock save, on rank 0; returns what stock returns, or why it could not.

    The others wait in ``_follow`` for rank 0's next word, so a failure that training survives ends with one too.
    """
    # Stock notes the best score on the function itself, before it writes; a save that fails takes that back.
    noted = dict(vars(checkpoint_utils.save_checkpoint))
    saved = failure = None
    with saving_together() as saving:
        try:
            saved = stock(cfg, *args)
            if saving.commit is not None:
                saved = None  # the file comes later: the caller must not upload or copy it now
                saving.commit.noted.update(noted)
            elif saved is not None:
                prune_sets(Path(cfg.save_dir), committed=Path(saved))
        except SaveError as error:  # agreed on by all ranks; the set is gone
            failure = str(error)
        except OSError as error:  # of rank 0 alone: a further name, or the deletion of an old file
            done = f"{saving.written} is written, but then " if saving.written else ""
            failure = f"{done}rank 0 met {error}"
    if failure is not None and saving.written is None:  # a file that was written keeps its score
        _forget_score(noted)
    broadcast_value(Done(failure=failure))
    return saved, failure


def _forget_score(noted: dict[str, Any]) -> None:
    vars(checkpoint_utils.save_checkpoint).clear()
    vars(checkpoint_utils.save_checkpoint).update(noted)


def _follow(trainer: Any, run: MoERun) -> str | None:
    """Take part in each save until rank 0 is done, on the other ranks; returns why it failed, if it did."""
    while not isinstance(request := broadcast_value(None), Done):
        content = _snapshot(trainer, run)
        if request.in_background:
            _write_in_background(run, content, request, None)
            continue
        try:
            agree_on_shards(write_share(content, request), request)
            agree_on_commit(None)
        except SaveError:
            logger.debug("rank 0 has met the same error, and says so when it is done")
    return request.failure


def _count_failures(run: MoERun, failure: str | None, *, update: int) -> None:
    if failure is None:
        run.num_failed_saves = 0
        return
    run.num_failed_saves += 1
    most = run.guard.config.max_failed_saves
    sentence = f"the save at update {update} failed: {failure}; earlier checkpoints are untouched"
    if run.num_failed_saves >= most:
        raise CheckpointError(
            f"{sentence}. This was failure {run.num_failed_saves} in a row (--max-failed-saves {most}), so "
            "the run ends; make room or mend the file system, then start it again.",
            agreed=True,
        )
    if rank() == 0:
        logger.warning(
            "%s. Training goes on (failure %d in a row, --max-failed-saves %d).",
            sentence,
            run.num_failed_saves,
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
    run = run_of(self)
    if run is None:
        return stock(self, filename, extra_state)
    saving = current_save()
    if saving is None and world_size() > 1:
        # Stock writes crash.pt from whichever ranks met the error; a save needs all of them.
        logger.warning("%s is not written: an MoE model is saved by all ranks together.", filename)
        return None
    path = Path(filename).absolute()
    logger.info("Saving checkpoint to %s", path)
    in_background = saving is not None and run.guard.config.save_in_background
    set_id = SetId.new(run_id=run.run_id, update=self.get_num_updates())
    run.run_id = set_id.run_id
    request = Request(directory=path.parent, set_id=set_id, in_background=in_background)
    broadcast_value(request)
    content = _snapshot(self, run)
    state = main_state(self)
    state["extra_state"].update(extra_state)

    def commit(entries: list[ShardEntry]) -> None:
        commit_main(path, state=state, set_id=set_id, shape=model_shape(self.cfg.model), entries=entries)
        logger.info("Finished saving checkpoint to %s", path)

    if saving is not None and in_background:
        saving.commit = Commit(main=commit, path=path)
        _write_in_background(run, content, request, saving.commit)
        return str(path)
    commit_together(path, request, commit, agree_on_shards(write_share(content, request), request))
    if saving is not None:
        saving.written = path
    return str(path)


def _snapshot(trainer: Any, run: MoERun) -> ShardContent:
    """Take this rank's share of the tensors, and of the optimizer state unless the user leaves that out."""
    return snapshot(run.state, run.mesh, with_optimizer=not trainer.cfg.checkpoint.no_save_optimizer_state)


def _write_in_background(run: MoERun, content: ShardContent, request: Request, commit: Commit | None) -> None:
    """Begin to write ``content`` as it is now, on all ranks, whatever training does meanwhile."""
    if not run.state.owns_memory:
        # The last save is finished, so its copy is free.
        content = run.background_copy = content.copied(run.background_copy)
    run.background = BackgroundSave(
        request=request, write=lambda: write_share(content, request), commit=commit
    )
    fault("save.background_begun")


def note_background_save(run: MoERun) -> None:
    """Tell the other ranks with the next update whether this rank's shard is written."""
    run.guard.has_background_save = run.background is not None and run.background.is_done


def finish_background_save(run: MoERun) -> None:
    """Wait on all ranks for the shards of a checkpoint that is being written, if any is, and commit it.

    Raises:
        CheckpointError: saves have failed too often in a row.
    """
    background = run.background
    if background is None:
        return
    request, run.background, failure = background.request, None, None
    try:
        entries = agree_on_shards(background.outcome(), request)
        if background.commit is None:
            agree_on_commit(None)
        else:
            commit_together(background.commit.path, request, background.commit.main, entries)
        failure = broadcast_value(_name_and_prune(background.commit))
    except SaveError as error:
        failure = str(error)
        if background.commit is not None:
            _forget_score(background.commit.noted)
    _count_failures(run, failure, update=request.set_id.update)


def _name_and_prune(commit: Commit | None) -> str | None:
    """Give the main file its further names and delete old sets, on rank 0; returns why it could not."""
    if commit is None:
        return None
    try:
        for copy in commit.copies:
            copy_atomically(commit.path, copy)
        prune_sets(commit.path.parent, committed=commit.path)
    except OSError as error:
        return f"{commit.path} is written, but then rank 0 met {error}"
    return None


@seam(
    "fairseq.trainer:Trainer.always_call_state_dict_during_save_checkpoint",
    signature=None,
    stock_does="makes the other ranks gather the sharded state that rank 0 is expected to gather",
    breaks="rank 0 asks for the shares first, and two different collectives wait for each other",
    we_do="an MoE model's state is gathered when rank 0 asks for it",
    test="tests/distributed/test_checkpoint.py",
)
def always_call_state_dict(stock: Callable[..., Any], self: Any) -> bool:
    return stock(self) and run_of(self) is None
