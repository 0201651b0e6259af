"""How a run answers SIGTERM (save and stop) and SIGUSR1 (save and go on), in training and in validation."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fairseq import checkpoint_utils
from fairseq.logging import metrics

from fairseq_moe.distributed import world_size
from fairseq_moe.stock.run import run_of
from fairseq_moe.stock.seam import seam

logger = logging.getLogger(__name__)

_TEST = "tests/reliability/test_r20_signals.py"


class _ValidationLeft(Exception):  # noqa: N818 (nothing is wrong)
    """All ranks leave validation here, because one of them was asked to stop."""


@seam(
    "fairseq_cli.train:validate_and_save",
    signature="(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)",
    stock_does="knows nothing of signals: the first SIGTERM ends a process where it stands",
    breaks="a job that is pre-empted or reaches its time limit loses what it did since the last checkpoint",
    we_do="save at the update at which all ranks know of the signal; after SIGTERM also leave validation, "
    "and end training",
    test=_TEST,
)
def validate_and_save(
    stock: Callable[..., Any],
    cfg: Any,
    trainer: Any,
    task: Any,
    epoch_itr: Any,
    valid_subsets: list[str],
    end_of_epoch: bool,
) -> tuple[list[float | None], bool]:
    run = run_of(trainer)
    if run is None:
        return stock(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
    guard = run.guard

    def save() -> None:
        guard.save = False
        _save(cfg, trainer, task, epoch_itr)

    guard.save_now = save
    if not guard.stop:
        if guard.save:
            save()
        try:
            with _kept_aggregators():
                return stock(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        except _ValidationLeft:
            logger.info("validation is left: SIGTERM")
    save()
    logger.info("training stops after update %d: SIGTERM", trainer.get_num_updates())
    return [None], True


def _save(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> None:
    if cfg.checkpoint.no_save:
        logger.warning("a signal asks for a checkpoint, and --no-save forbids it.")
        return
    no_last = cfg.checkpoint.no_last_checkpoints
    cfg.checkpoint.no_last_checkpoints = False  # a run that was pre-empted resumes from there
    try:
        path = checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    finally:
        cfg.checkpoint.no_last_checkpoints = no_last
    if path is not None and hasattr(task, "post_save"):
        task.post_save(path, trainer.get_num_updates())


@contextmanager
def _kept_aggregators() -> Iterator[None]:
    """Put fairseq's running averages back where an exception has left the validation's own in place."""
    active, counts = metrics._active_aggregators.copy(), metrics._active_aggregators_cnt.copy()
    try:
        yield
    except _ValidationLeft:
        for kept, now in (
            (active, metrics._active_aggregators),
            (counts, metrics._active_aggregators_cnt),
        ):
            now.clear()
            now.update(kept)
        raise


@seam(
    "fairseq.trainer:Trainer.valid_step",
    signature="(self, sample, raise_oom)",
    stock_does="tries a batch again that has run out of memory",
    breaks="the other ranks wait in the exchange of another layer; a long validation does not hear signals",
    we_do="on several ranks that error ends the rank; all ranks agree about signals before each step",
    test=_TEST,
)
def trainer_valid_step(stock: Callable[..., Any], self: Any, sample: Any, raise_oom: bool = False) -> Any:
    run = run_of(self)
    if run is None:
        return stock(self, sample, raise_oom)
    guard = run.guard
    guard.agree_on_signals(self.device)
    if guard.stop:
        raise _ValidationLeft
    if guard.save:
        guard.save_now()
    return stock(self, sample, raise_oom or world_size() > 1)
