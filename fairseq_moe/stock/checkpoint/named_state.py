"""*State by name*: a trainer's tensors and optimizer state under parameter names, whatever wrapper is around the model.

Checkpoints hold nothing else: torch's numbers of parameters, and the way in which a backend shards them, differ
between runs that must read one another's files. Each way to hold parameters has one implementation of
``NamedState``; ``choose_state`` picks a run's once. Here is the one for whole parameters.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fairseq_moe.checkpoint import ShardContent, find_aliases, has_expert_rows, share_of
from fairseq_moe.distributed import ParallelMesh, gather_values
from fairseq_moe.errors import CheckpointError
from fairseq_moe.parallel.placement import EXPERT, holds_first_copy
from fairseq_moe.stock.checkpoint.changes import Resets, class_changes, group_changes
from fairseq_moe.stock.checkpoint.parts import Parts
from fairseq_moe.stock.optim import float32_copies

__all__ = [
    "NamedState",
    "WholeState",
    "choose_state",
    "implements_state",
    "keep_all",
    "load_optimizer",
    "names_in_order",
    "numbered_groups",
    "own_values",
    "restore_progress",
    "snapshot",
]


def keep_all(name: str) -> bool:
    """Keep the tensor of any name."""
    return True


class NamedState(Protocol):
    """Turn one backend's parameters and optimizer state into tensors by name, and back.

    Names are those of the model without wrappers. ``model_tensors`` and ``optimizer_values`` are called by all ranks
    together. Each rank has its own experts, (L, ...) each.

    Attributes:
        owns_memory: what is given shares no memory with the model, so training may go on while it is written.
    """

    owns_memory: bool

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """List what the optimizer steps of the model on this rank; needs no communication."""

    def tensor_bytes(self) -> tuple[dict[str, int], dict[str, str]]:
        """Count the bytes of each tensor of ``model_tensors``; also further names of some (tied weights)."""

    def model_tensors(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, Tensor]:
        """Collect the parameters and buffers that this rank keeps; aliases are asked for under their tensor's name."""

    def optimizer_values(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, dict[str, Any]]:
        """Collect the optimizer state of the parameters that have any, in the parameter's own shape."""

    def optimizer_form(
        self, named: Mapping[str, Mapping[str, Any]], groups: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Number saved state and hyper-parameters as the optimizer's ``load_state_dict`` takes them."""


# One row per way to hold parameters: whether a trainer's configuration asks for it, and its implementation.
_IMPLEMENTATIONS: list[tuple[Callable[[Any], bool], Callable[[Any], NamedState]]] = []

_Implementation = TypeVar("_Implementation", bound=Callable[[Any], NamedState])


def implements_state(fits: Callable[[Any], bool]) -> Callable[[_Implementation], _Implementation]:
    """Declare the decorated class, which is made from a trainer, as the ``NamedState`` of some configurations.

    Args:
        fits: told a trainer's configuration, whether its parameters are held so.
    """

    def declare(implementation: _Implementation) -> _Implementation:
        _IMPLEMENTATIONS.append((fits, implementation))
        return implementation

    return declare


def choose_state(trainer: Any) -> NamedState:
    """Choose the implementation that fits a trainer's configuration; if there is none, whole parameters."""
    for fits, implementation in _IMPLEMENTATIONS:
        if fits(trainer.cfg):
            return implementation(trainer)
    return WholeState(trainer)


class WholeState:
    """Name parameters that are whole on each rank, as under legacy_ddp, pytorch_ddp or in a single process.

    Args:
        trainer: of stock; its optimizer may be built anew later.
    """

    owns_memory = False  # on a CPU, what is given are the tensors of the model itself

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """List the model's parameters."""
        return self._trainer.get_model().named_parameters()  # type: ignore[no-any-return]

    @property
    def _parts(self) -> Parts:
        return Parts(self._trainer.get_model())

    def tensor_bytes(self) -> tuple[dict[str, int], dict[str, str]]:
        """Count the bytes of each tensor; also further names of some of them."""
        state, parts = self._trainer.get_model().state_dict(), self._parts
        aliases = find_aliases(state)
        return {
            name: parts.whole_numel(name, tensor.numel()) * tensor.itemsize
            for name, tensor in state.items()
            if name not in aliases
        }, aliases

    def model_tensors(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, Tensor]:
        """Collect the tensors of the model that this rank keeps."""
        state, parts = self._trainer.get_model().state_dict(), self._parts
        aliases = find_aliases(state)
        joined = ((name, parts.join(name, state[name])) for name in state if name not in aliases)
        kept = {name: tensor for name, tensor in joined if is_kept(name)}
        kept |= {alias: kept[name] for alias, name in aliases.items() if name in kept}
        return {name: kept[name] for name in state if name in kept}

    def optimizer_values(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, dict[str, Any]]:
        """Collect the state of each parameter; that of a float32 copy goes under the name of the parameter."""
        parts = self._parts
        joined = (
            (name, {key: parts.join(name, value) for key, value in values.items()})
            for name, values in own_values(self, self._trainer.optimizer).items()
        )
        return {name: values for name, values in joined if is_kept(name)}

    def optimizer_form(
        self, named: Mapping[str, Mapping[str, Any]], groups: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Number state and groups as torch numbers the optimizer's parameters."""
        names, parts = names_in_order(self, self._trainer.optimizer), self._parts
        return {
            "state": {
                index: {key: parts.cut(name, value) for key, value in named[name].items()}
                for index, name in enumerate(names)
                if name in named
            },
            "param_groups": numbered_groups(groups, self._trainer.optimizer),
        }


def own_values(state: NamedState, optimizer: Any) -> dict[str, dict[str, Any]]:
    """Take an optimizer's state as it is on this rank, by parameter name."""
    names = names_in_order(state, optimizer)
    return {names[index]: values for index, values in optimizer.state_dict()["state"].items()}


def names_in_order(state: NamedState, optimizer: Any) -> list[str]:
    """List parameter names in the order in which torch numbers the optimizer's parameters."""
    name_of = {id(p): name for name, p in state.named_parameters()}
    name_of.update({id(copy): name_of[id(p)] for copy, p in float32_copies(optimizer)})
    return [name_of[id(p)] for group in optimizer.optimizer.param_groups for p in group["params"]]


def numbered_groups(groups: list[dict[str, Any]], optimizer: Any) -> list[dict[str, Any]]:
    """Give saved hyper-parameters the numbers that torch gives the parameters of each of the optimizer's groups."""
    first, numbered = 0, []
    for group, own in zip(groups, optimizer.optimizer.param_groups, strict=True):
        numbered.append({**group, "params": list(range(first, first + len(own["params"])))})
        first += len(own["params"])
    return numbered


def snapshot(state: NamedState, mesh: ParallelMesh, *, with_optimizer: bool) -> ShardContent:
    """Take the tensors and optimizer state that this rank writes into a checkpoint; all ranks together.

    Dense tensors are spread over all ranks of a stage, experts are written by one replica, and what several stages
    have (tied words, stock's number of a version) by the first of them. Unless the state owns its memory, training
    must wait until they are written, or copied.
    """
    ranks, own = mesh.ranks, mesh.rank
    sizes, aliases = state.tensor_bytes()
    elsewhere = _names_of_earlier_stages(mesh, sizes)
    writers = [
        holds_first_copy(EXPERT, ranks, mesh.rank_in_stage(place)) for place in range(ranks.stage_size)
    ]
    place = own % ranks.stage_size
    experts = sum(size for name, size in sizes.items() if has_expert_rows(name))
    is_mine = share_of(
        place,
        expert_bytes=[experts if writes else 0 for writes in writers],
        dense_bytes={name: size for name, size in sizes.items() if not has_expert_rows(name)},
        aliases=aliases,
    )

    def is_written(name: str) -> bool:
        return is_mine(name) and aliases.get(name, name) not in elsewhere

    model = state.model_tensors(is_written)
    return ShardContent(
        expert_ids=list(mesh.layout.local_ids(own)) if writers[place] else [],
        model={name: tensor for name, tensor in model.items() if name not in aliases},
        optimizer=state.optimizer_values(is_written) if with_optimizer else {},
        aliases={alias: name for alias, name in aliases.items() if is_mine(name)},
    )


def _names_of_earlier_stages(mesh: ParallelMesh, own: Iterable[str]) -> set[str]:
    """Collect the names that stages before this rank's have; collective over the pipeline."""
    if mesh.ranks.pipe == 1:
        return set()
    return set().union(*gather_values(sorted(own), group=mesh.pipe)[: mesh.pipe_index])


def load_optimizer(
    trainer: Any, state: NamedState, saved: dict[str, Any], *, overrides: Any, resets: Resets, saved_cfg: Any
) -> None:
    """Continue from saved optimizer state, learning-rate schedule and update count.

    Args:
        trainer: its model is loaded already.
        state: the trainer's.
        saved: ``named`` state, ``param_groups`` and maybe ``loss_scale``.
        overrides: optimizer hyper-parameters that replace the saved ones.
        resets: whether to leave the schedule as it is.
        saved_cfg: the checkpoint's whole configuration, to say what differs.

    Raises:
        CheckpointError: the state was written by another criterion or optimizer, or with hyper-parameters that
            would silently win over this run's flags.
    """
    trainer._build_optimizer()  # half-precision optimizers copy the parameters that were just loaded
    last = trainer._optim_history[-1]
    problems = [
        *class_changes(last, trainer, saved_cfg),
        *group_changes(saved["param_groups"], trainer.optimizer.param_groups, overrides),
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint's optimizer state cannot be continued: {'; '.join(problems)}.", agreed=True
        )
    form = state.optimizer_form(saved["named"], saved["param_groups"])
    if "loss_scale" in saved:
        form["loss_scale"] = saved["loss_scale"]
    trainer.optimizer.load_state_dict(form, overrides)
    restore_progress(trainer, resets)


def restore_progress(trainer: Any, resets: Resets) -> None:
    """Continue the learning-rate schedule and the update count of the checkpoint that was read last."""
    last = trainer._optim_history[-1]
    if not resets.scheduler:
        trainer.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
    trainer.set_num_updates(last["num_updates"])
