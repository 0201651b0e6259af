"""*State by name* of a ``ShardedModel``: gathered tensor by tensor, and cut into this rank's parts again."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairseq_moe.distributed import gather_values
from fairseq_moe.flags.sharding import sharding_of
from fairseq_moe.stock.checkpoint.named_state import (
    implements_state,
    keep_all,
    names_in_order,
    numbered_groups,
    own_values,
)
from fairseq_moe.stock.checkpoint.parts import Parts, has_shape

if TYPE_CHECKING:
    from fairseq_moe.distributed.shards import ParameterShard
    from fairseq_moe.stock.sharding.sharded_model import ShardedModel

__all__ = ["ShardedState"]


@implements_state(lambda cfg: sharding_of(cfg) is not None)
class ShardedState:
    """Name parameters of which each rank holds a part.

    Every tensor is gathered by the ranks that share it, in the same order on all of them, and copied to the CPU by
    those that keep it: one whole tensor at a time is in memory.

    Args:
        trainer: of stock, whose model is a ``ShardedModel``; its optimizer may be built anew later.
    """

    owns_memory = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """List this rank's parts."""
        return self._trainer.model.named_parameters()  # type: ignore[no-any-return]

    def tensor_bytes(self) -> tuple[dict[str, int], dict[str, str]]:
        """Count the bytes of each whole tensor; also further names of some of them; needs no communication."""
        aliases = self._aliases()
        state = self._trainer.get_model().state_dict()
        parts = Parts(self._trainer.get_model())
        sizes = {
            name: parts.whole_numel(name, tensor.numel()) * tensor.dtype.itemsize
            for name, tensor in state.items()
        }
        return {name: size for name, size in sizes.items() if name not in aliases}, aliases

    def model_tensors(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, Tensor]:
        """Gather parameters and buffers on CPU, in memory of their own; collective."""
        model: ShardedModel = self._trainer.model
        model.free_gathered()
        aliases, parts, state = self._aliases(), Parts(self._trainer.get_model()), {}
        for name, tensor in model.module.state_dict().items():
            if name in aliases:
                continue
            found = model.shards.get(name)
            whole = parts.join(name, tensor if found is None else found.gather(found.local))
            if is_kept(name):
                state[name] = whole.detach().to("cpu", copy=True)
        return state | {alias: state[name] for alias, name in aliases.items() if name in state}

    def optimizer_values(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, dict[str, Any]]:
        """Gather the state of each parameter, in the shape of the whole; collective.

        A part may be empty, and an optimizer have no state of it, so the ranks first tell one another what there is.
        """
        own = own_values(self, self._trainer.optimizer)
        shards, parts = self._trainer.model.shards, Parts(self._trainer.get_model())
        described = {
            name: _described(values) for name, values in own.items() if not _is_empty(shards.get(name))
        }
        known: dict[str, dict[str, Any]] = {}
        for other in gather_values(described):
            known |= {name: kinds for name, kinds in other.items() if name not in known}
        found = {}
        of_stage = {name for name, _ in self.named_parameters()}  # other stages of a pipeline have others
        for name in sorted(known.keys() & of_stage):
            values = {
                key: parts.join(name, _gathered(shards.get(name), own.get(name, {}).get(key), kind))
                for key, kind in known[name].items()
            }
            if is_kept(name):
                found[name] = {
                    key: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }
        return found

    def optimizer_form(
        self, named: Mapping[str, Mapping[str, Any]], groups: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Number this rank's parts of the state as torch numbers the optimizer's parameters."""
        shards, parts = self._trainer.model.shards, Parts(self._trainer.get_model())
        state = {
            index: {key: _cut(shards.get(name), parts.cut(name, value)) for key, value in named[name].items()}
            for index, name in enumerate(names_in_order(self, self._trainer.optimizer))
            if name in named
        }
        return {"state": state, "param_groups": numbered_groups(groups, self._trainer.optimizer)}

    def _aliases(self) -> dict[str, str]:
        """Find further names of tied parameters: parts may be empty, and then lie at no place in memory."""
        first: dict[int, str] = {}
        named = self._trainer.get_model().named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def _is_empty(shard: "ParameterShard | None") -> bool:
    return shard is not None and shard.local.numel() == 0


def _described(values: Mapping[str, Any]) -> dict[str, Any]:
    """Describe one parameter's state: the dtype of what has the parameter's shape, and everything else itself."""
    return {key: value.dtype if has_shape(value) else _on_cpu(value) for key, value in values.items()}


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _gathered(shard: "ParameterShard | None", own: Any, kind: Any) -> Any:
    if not isinstance(kind, torch.dtype):
        return kind
    if shard is None:
        return own
    return shard.gather(shard.local.new_empty(shard.local.shape, dtype=kind) if own is None else own)


def _cut(shard: "ParameterShard | None", value: Any) -> Any:
    return shard.cut(value) if shard is not None and has_shape(value) else value
