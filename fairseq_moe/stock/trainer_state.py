"""A trainer's state under parameter names, whatever wrapper is around the model."""

from typing import Any

from torch import Tensor

from fairseq_moe.errors import CheckpointError
from fairseq_moe.stock.optimizer_state import indexed_optimizer_state, named_optimizer_state

__all__ = ["load_optimizer", "model_state", "named_optimizer"]


def model_state(trainer: Any) -> dict[str, Tensor]:
    """All ranks: dense tensors (complete on rank 0) and this rank's experts, by canonical name."""
    if trainer.is_fsdp:
        from fairseq_moe.stock.fsdp import full_model_state

        return full_model_state(trainer.model)
    return trainer.get_model().state_dict()


def named_optimizer(trainer: Any) -> dict[str, dict[str, Any]]:
    """All ranks: optimizer state by canonical parameter name; empty with --no-save-optimizer-state."""
    if trainer.cfg.checkpoint.no_save_optimizer_state:
        return {}
    if trainer.is_fsdp:
        from fairseq_moe.stock.fsdp import named_optimizer_state as sharded_named_optimizer_state

        return sharded_named_optimizer_state(trainer.model, trainer.optimizer)
    return named_optimizer_state(trainer.get_model(), trainer.optimizer)


def load_optimizer(trainer: Any, saved: dict[str, Any], *, overrides: Any, reset_lr_scheduler: bool) -> None:
    """Continue from saved optimizer state, learning-rate schedule and update count.

    Args:
        trainer: its model is loaded already.
        saved: ``named`` state, ``param_groups`` and maybe ``loss_scale``.
        overrides: optimizer hyper-parameters that replace the saved ones.
        reset_lr_scheduler: leave the schedule as it is.

    Raises:
        CheckpointError: the state was written by another criterion or optimizer.
    """
    trainer._build_optimizer()  # half-precision optimizers copy the parameters that were just loaded
    last = trainer._optim_history[-1]
    for what, found, flag in (
        ("criterion_name", type(trainer.get_criterion()).__name__, "--criterion"),
        ("optimizer_name", type(trainer.optimizer).__name__, "--optimizer"),
    ):
        if last[what] != found:
            raise CheckpointError(
                f"the checkpoint was trained with {last[what]} and this run has {found}; give the same "
                f"{flag} and precision, or pass --reset-optimizer."
            )
    if not reset_lr_scheduler:
        trainer.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
    if trainer.is_fsdp:
        from fairseq_moe.stock.fsdp import sharded_optimizer_state

        state = sharded_optimizer_state(
            trainer.model, trainer.optimizer, saved["named"], saved["param_groups"]
        )
    else:
        state = indexed_optimizer_state(
            trainer.get_model(), trainer.optimizer, saved["named"], saved["param_groups"]
        )
    if "loss_scale" in saved:
        state["loss_scale"] = saved["loss_scale"]
    trainer.optimizer.load_state_dict(state, overrides)
    trainer.set_num_updates(last["num_updates"])
