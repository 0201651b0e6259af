"""Train and save a tiny model through stock's own functions. For forked ranks only."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import checkpoint_utils

from fairseq_moe.faults import VARIABLE
from fairseq_moe.stock.run import MoERun, run_of
from tests.helpers.tiny import build_trainer, make_batch, update

__all__ = ["ADAM", "TinyRun"]

ADAM = ["--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--lr", "0.01"]


class TinyRun:
    """A run of fairseq-train in small: updates on random words, saves and loads.

    Args:
        save_dir: where checkpoints go.
        flags: in addition to those of ``tests.helpers.tiny`` and Adam.
        dtype: as that of ``build_trainer``.
    """

    def __init__(self, save_dir: Path, *flags: Any, dtype: torch.dtype = torch.float32) -> None:
        self.trainer = build_trainer([*ADAM, "--save-dir", save_dir, *flags], dtype=dtype)
        self.checkpoint_cfg = self.trainer.cfg.checkpoint
        self._end_of_epoch = False

    @property
    def record(self) -> MoERun:
        """What the adapter remembers of this run."""
        run = run_of(self.trainer)
        assert run is not None
        return run

    @property
    def num_updates(self) -> int:
        """Count the updates done."""
        return int(self.trainer.get_num_updates())

    def train(self, num_updates: int) -> list[dict[str, float]]:
        """Do so many updates; returns what each logs. Its words depend on its number and the data rank alone."""
        data_rank = self.trainer.data_parallel_rank
        return [
            update(self.trainer, [make_batch(100 * self.num_updates + data_rank)]) for _ in range(num_updates)
        ]

    def save(
        self, *, val_loss: float | None = None, end_of_epoch: bool = False, fault: str | None = None
    ) -> Any:
        """Save as stock's training loop does, maybe with an injected fault."""
        epoch_itr = SimpleNamespace(
            epoch=1,
            end_of_epoch=lambda: end_of_epoch,
            state_dict=lambda: {"epoch": 1, "iterations_in_epoch": self.num_updates},
        )
        if fault is not None:
            os.environ[VARIABLE] = fault
        try:
            return checkpoint_utils.save_checkpoint(self.checkpoint_cfg, self.trainer, epoch_itr, val_loss)
        finally:
            if fault is not None:
                del os.environ[VARIABLE]

    def load(self, filename: Path | None = None) -> Any:
        """Load a file (None: checkpoint_last.pt) with ``Trainer.load_checkpoint``; returns what that does."""
        path = filename or Path(self.checkpoint_cfg.save_dir) / "checkpoint_last.pt"
        return self.trainer.load_checkpoint(str(path))
