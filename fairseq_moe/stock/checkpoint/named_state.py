"""A trainer's state under parameter names, whatever wrapper is around the model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fairseq_moe.checkpoint import ShardContent, find_aliases, has_expert_rows, share_of
from fairseq_moe.distributed import rank
from fairseq_moe.errors import CheckpointError
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.stock.optim import float32_copies

__all__ = ["load_optimizer", "named_optimizer", "snapshot"]


def snapshot(trainer: Any, decoder: MoEDecoder) -> ShardContent:
    """All ranks: the tensors and optimizer state that this rank writes into a checkpoint.

    Dense tensors are spread over all ranks, experts are written by one replica. On a CPU, tensors that are
    not sharded are those of the model itself: training must wait until they are written.
    """
    assert decoder.mesh is not None
    layout = decoder.mesh.layout
    sizes, aliases = _tensor_bytes(trainer)
    experts = sum(size for name, size in sizes.items() if has_expert_rows(name))
    is_written = share_of(
        rank(),
        expert_bytes=[experts if layout.is_owner(other) else 0 for other in range(layout.world_size)],
        dense_bytes={name: size for name, size in sizes.items() if not has_expert_rows(name)},
        aliases=aliases,
    )
    model = _model_state(trainer, is_written)
    return ShardContent(
        expert_ids=list(layout.local_ids(rank())) if layout.is_owner(rank()) else [],
        model={name: tensor for name, tensor in model.items() if name not in aliases},
        optimizer=named_optimizer(trainer, is_written),
        aliases={alias: name for alias, name in aliases.items() if is_written(name)},
    )


def _tensor_bytes(trainer: Any) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes of each tensor of this rank's model, and further names of some of them, on every rank alike."""
    if trainer.is_fsdp:
        from fairseq_moe.stock.sharding.fsdp import tensor_bytes

        return tensor_bytes(trainer.model)
    state = trainer.get_model().state_dict()
    aliases = find_aliases(state)
    return {name: tensor.nbytes for name, tensor in state.items() if name not in aliases}, aliases


def _model_state(trainer: Any, is_written: Callable[[str], bool]) -> dict[str, Tensor]:
    if trainer.is_fsdp:
        from fairseq_moe.stock.sharding.fsdp import full_model_state

        return full_model_state(trainer.model, is_written)
    return {name: tensor for name, tensor in trainer.get_model().state_dict().items() if is_written(name)}


def _keep_all(name: str) -> bool:
    return True


def named_optimizer(trainer: Any, is_written: Callable[[str], bool] = _keep_all) -> dict[str, dict[str, Any]]:
    """All ranks: optimizer state by canonical parameter name; empty with --no-save-optimizer-state."""
    if trainer.cfg.checkpoint.no_save_optimizer_state:
        return {}
    if trainer.is_fsdp:
        from fairseq_moe.stock.sharding.fsdp import named_optimizer_state as sharded_named_optimizer_state

        return sharded_named_optimizer_state(trainer.model, trainer.optimizer, is_written)
    named = _named_optimizer_state(trainer.get_model(), trainer.optimizer)
    return {name: values for name, values in named.items() if is_written(name)}


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
        from fairseq_moe.stock.sharding.fsdp import sharded_optimizer_state

        state = sharded_optimizer_state(
            trainer.model, trainer.optimizer, saved["named"], saved["param_groups"]
        )
    else:
        state = _indexed_optimizer_state(
            trainer.get_model(), trainer.optimizer, saved["named"], saved["param_groups"]
        )
    if "loss_scale" in saved:
        state["loss_scale"] = saved["loss_scale"]
    trainer.optimizer.load_state_dict(state, overrides)
    trainer.set_num_updates(last["num_updates"])


def _named_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    """The state of each parameter that has one.

    Args:
        model: the unwrapped model, whose parameters (or float32 masters of them) the optimizer holds.
        optimizer: a fairseq optimizer.
    """
    names = _names_in_order(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {names[index]: values for index, values in state.items()}


def _indexed_optimizer_state(
    model: nn.Module, optimizer: Any, named: dict[str, dict[str, Any]], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """The inverse: what torch's ``load_state_dict`` takes.

    Args:
        model: as above.
        optimizer: as above.
        named: state by parameter name.
        groups: saved hyper-parameters of each parameter group.
    """
    names = _names_in_order(model, optimizer)
    sizes = [len(group["params"]) for group in optimizer.optimizer.param_groups]
    first = 0
    numbered = []
    for group, size in zip(groups, sizes, strict=True):
        numbered.append({**group, "params": list(range(first, first + size))})
        first += size
    return {
        "state": {index: named[name] for index, name in enumerate(names) if name in named},
        "param_groups": numbered,
    }


def _names_in_order(model: nn.Module, optimizer: Any) -> list[str]:
    """Parameter names in the order in which torch numbers the optimizer's parameters."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    name_of.update({id(master): name_of[id(p)] for master, p in float32_copies(optimizer)})
    return [name_of[id(p)] for group in optimizer.optimizer.param_groups for p in group["params"]]
