"""Loading MoE models through stock's trainer: which file a start continues from, and what is restored from it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq_moe.checkpoint import newest_intact
from fairseq_moe.distributed import broadcast_value, gather_values, rank
from fairseq_moe.errors import CheckpointError
from fairseq_moe.stock.checkpoint.changes import Resets
from fairseq_moe.stock.checkpoint.named_state import load_optimizer, restore_progress
from fairseq_moe.stock.checkpoint.padding_mask import keep_padding_mask
from fairseq_moe.stock.checkpoint.reading import TrainerRequest, reading_for, resolve_branch, with_advice
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.seam import seam

logger = logging.getLogger(__name__)

_MAX_LISTED = 4


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
    filename = resolve_branch(filename)
    if run is not None:
        filename = _find(filename, self.cfg.checkpoint)
    # Stock resets all where it begins from that model, and refuses the flag beside any --reset-*.
    begins = self.cfg.checkpoint.finetune_from_model is not None and reset_meters
    resets = Resets(
        optimizer=reset_optimizer,
        scheduler=reset_lr_scheduler,
        data=begins or self.cfg.checkpoint.reset_dataloader,
    )
    request = TrainerRequest(self.cfg, self.get_model(), resets)
    with reading_for(request):
        extra_state = stock(
            self,
            filename,
            reset_optimizer or run is not None,
            reset_lr_scheduler,
            optimizer_overrides,
            reset_meters,
        )
    if run is None:
        return extra_state
    if request.optimizer is not None:
        load_optimizer(
            self,
            run.state,
            request.optimizer,
            overrides=optimizer_overrides,
            resets=resets,
            saved_cfg=request.saved_cfg,
        )
        logger.info("Loaded optimizer state (%d updates)", self.get_num_updates())
    elif extra_state is not None and not reset_optimizer:
        _continue_without_optimizer(self, filename, resets)
    saved = None if begins or request.saved_cfg is None else request.saved_cfg.get("model")
    keep_padding_mask(run.decoder, self.cfg.model, saved)
    run.run_id = request.run_id
    if extra_state is not None:
        _move_position(extra_state["train_iterator"], request.num_data_ranks, self.data_parallel_world_size)
    return extra_state


def _continue_without_optimizer(trainer: Any, filename: str, resets: Resets) -> None:
    """Take up update count and schedule, which are no optimizer state, from a file without one."""
    restore_progress(trainer, resets)
    if trainer.get_num_updates() > 0:
        logger.warning(
            "%s holds no optimizer state: training goes on from update %d and the optimizer's moments begin afresh "
            "(train without --no-save-optimizer-state to keep them)",
            filename,
            trainer.get_num_updates(),
        )


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
        raise with_advice(
            f"--restore-file {cfg.restore_file} does not exist (looked for {filename}); correct the path, or "
            "leave the flag out to start afresh.",
            path,
        )
    others = broadcast_value([other.name for other in sorted(path.parent.glob("checkpoint*.pt"))])
    if not others:
        return filename
    intact = broadcast_value(newest_intact(path.parent) if rank() == 0 else None)
    if intact is None or cfg.no_last_checkpoints:
        raise with_advice(
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
