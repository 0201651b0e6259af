"""The state of a model under FSDP by parameter name: gathered from the shards, and put back.

Names are those of the model without wrappers. The functions are called by every rank. Tensors are gathered
from the ranks that share them, experts too; a rank keeps those that it is asked to keep, one flat parameter at
a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.data_parallel import FullyShardedDataParallel
from torch import Tensor, nn

from fairseq_moe.distributed.sharding import all_gather_flat
from fairseq_moe.errors import CheckpointError

__all__ = [
    "full_model_state",
    "keep_all",
    "load_full_model_state",
    "named_optimizer_state",
    "sharded_optimizer_state",
    "tensor_bytes",
]

_WRAPPERS = ("_fsdp_wrapped_module", "_fpw_module")


@dataclass(frozen=True, kw_only=True)
class _FlatParameter:
    """Several tensors end to end, of which this rank holds one part.

    Args:
        owner: the FSDP instance around it.
        parameter: the part, (N,), padded to the same N on every rank of the owner's group.
        names: of the tensors.
        shapes: of the tensors.
        aliases: further names of some of them (tied weights).
    """

    owner: FullyShardedDataParallel
    parameter: nn.Parameter
    names: list[str]
    shapes: list[torch.Size]
    aliases: dict[str, str]

    def gather(self, shard: Tensor, is_kept: Callable[[str], bool]) -> dict[str, Tensor]:
        """The whole tensors that are kept, by name, on CPU in memory of their own; collective."""
        full = shard.detach()
        if self.owner.world_size > 1:
            full = all_gather_flat(full, self.owner.process_group)
        parts = full[: sum(self._numels)].split(self._numels)
        return {
            name: part.view(shape).to("cpu", copy=True)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
            if is_kept(name)
        }

    def shard(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's part of the tensors, in fresh memory."""
        full = torch.cat([tensor.reshape(-1) for tensor in tensors])
        size = self.parameter.numel()
        part = full[self.owner.rank * size : (self.owner.rank + 1) * size]
        return F.pad(part, [0, size - part.numel()])

    @property
    def _numels(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]


def keep_all(name: str) -> bool:
    """Every tensor is kept."""
    return True


def tensor_bytes(model: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes of each tensor that ``full_model_state`` would give, and further names of some (tied weights)."""
    sizes, aliases = {}, {}
    for flat in _flat_parameters(model):
        itemsize = flat.parameter.dtype.itemsize
        sizes.update(
            {name: shape.numel() * itemsize for name, shape in zip(flat.names, flat.shapes, strict=True)}
        )
        aliases.update(flat.aliases)
    sizes.update({name: buffer.numel() * buffer.dtype.itemsize for name, buffer, _ in _buffers(model)})
    return sizes, aliases


def full_model_state(model: nn.Module, is_kept: Callable[[str], bool] = keep_all) -> dict[str, Tensor]:
    """Parameters and buffers by name, on CPU in fresh memory; collective.

    Each rank gets its own experts, (L, ...) each.

    Args:
        model: the FSDP root.
        is_kept: which names this rank keeps; aliases are asked for under their tensor's name.
    """
    state = {}
    for flat in _flat_parameters(model):
        state.update(flat.gather(flat.parameter.data, is_kept))
        state.update({alias: state[name] for alias, name in flat.aliases.items() if name in state})
    for name, buffer, owner in _buffers(model):
        if is_kept(name):
            is_halved = owner is not None and owner.mixed_precision and buffer.dtype == torch.float16
            state[name] = (buffer.float() if is_halved else buffer).detach().to("cpu", copy=True)
    return state


@torch.no_grad()
def load_full_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what ``full_model_state`` gave, on any number of ranks; needs no communication.

    Args:
        model: the FSDP root.
        state: all dense tensors and this rank's experts.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs.
    """
    flats = list(_flat_parameters(model))
    shapes = {name: shape for flat in flats for name, shape in zip(flat.names, flat.shapes, strict=True)}
    for flat in flats:
        shapes.update({alias: shapes[name] for alias, name in flat.aliases.items()})
    buffers = {name: buffer for name, buffer, _ in _buffers(model)}
    shapes.update({name: buffer.shape for name, buffer in buffers.items()})
    _refuse("model state", list(_shape_problems(state, shapes)))
    for flat in flats:
        flat.parameter.data.copy_(flat.shard(state[name] for name in flat.names))
    for name, buffer in buffers.items():
        buffer.copy_(state[name])
    for flat in flats:
        if hasattr(flat.parameter, "_fp32_shard"):  # set up: there may be gathered copies of the old weights
            flat.owner._free_full_params()


def named_optimizer_state(
    model: nn.Module, optimizer: Any, is_kept: Callable[[str], bool] = keep_all
) -> dict[str, dict[str, Any]]:
    """Optimizer state by parameter name, tensors in the parameter's own shape; collective.

    Args:
        model: the FSDP root.
        optimizer: a fairseq optimizer over its parameters.
        is_kept: which names this rank keeps.

    Returns:
        As ``full_model_state``. Scalars are repeated for each name. A parameter without state is left out.
    """
    state = optimizer.state_dict()["state"]
    index_of = _optimizer_indices(optimizer)
    named: dict[str, dict[str, Any]] = {}
    for flat in _flat_parameters(model):
        entries = state.get(index_of.get(id(flat.parameter)), {})
        for key in sorted(entries):
            value = entries[key]
            if _has_shape(value):
                values: dict[str, Any] = flat.gather(value, is_kept)
            else:
                scalar = value.detach().cpu() if isinstance(value, Tensor) else value
                values = {
                    name: scalar.clone() if isinstance(scalar, Tensor) else scalar
                    for name in flat.names
                    if is_kept(name)
                }
            for name, own in values.items():
                named.setdefault(name, {})[key] = own
    return named


def sharded_optimizer_state(
    model: nn.Module,
    optimizer: Any,
    named: Mapping[str, Mapping[str, Any]],
    groups: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The inverse: what the optimizer's ``load_state_dict`` takes; needs no communication.

    Args:
        model: the FSDP root.
        optimizer: as above.
        named: state by name, of all dense parameters and this rank's experts.
        groups: saved hyper-parameters of each parameter group (None: the optimizer's present ones).

    Raises:
        CheckpointError: the state does not fit the model.
    """
    index_of = _optimizer_indices(optimizer)
    flats = [flat for flat in _flat_parameters(model) if id(flat.parameter) in index_of]
    known = {name for flat in flats for name in flat.names}
    problems = [f"{name} is unknown" for name in named if name not in known]
    flats = [flat for flat in flats if any(name in named for name in flat.names)]
    problems += [problem for flat in flats for problem in _entry_problems(flat, named)]
    _refuse("optimizer state", problems)
    state = {}
    for flat in flats:
        keys = named[flat.names[0]]
        state[index_of[id(flat.parameter)]] = {key: _flat_value(flat, key, named) for key in keys}
    own_groups = optimizer.optimizer.param_groups
    chosen = own_groups if groups is None else groups
    first, numbered = 0, []
    for group, own in zip(chosen, own_groups, strict=True):
        numbered.append({**group, "params": list(range(first, first + len(own["params"])))})
        first += len(own["params"])
    return {"state": state, "param_groups": numbered}


def _flat_value(flat: _FlatParameter, key: str, named: Mapping[str, Mapping[str, Any]]) -> Any:
    values = [named[name][key] for name in flat.names]
    if _has_shape(values[0]):
        return flat.shard(values).to(flat.parameter.device)
    return values[0].clone() if isinstance(values[0], Tensor) else values[0]


def _entry_problems(flat: _FlatParameter, named: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What keeps the state of a flat parameter's tensors from being laid end to end."""
    first = next(named[name] for name in flat.names if name in named)
    for name, shape in zip(flat.names, flat.shapes, strict=True):
        entries = named.get(name, {})
        if entries.keys() != first.keys():
            yield f"{name} has {sorted(entries)} instead of {sorted(first)}"
            continue
        for key, value in entries.items():
            if _has_shape(value):
                if value.shape != shape:
                    yield f"{key} of {name} is {tuple(value.shape)} instead of {tuple(shape)}"
            elif bool(value != first[key]):
                yield f"{key} of {name} is {value} but {first[key]} of a parameter sharded with it"


def _has_shape(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _shape_problems(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in expected if name not in found)
    yield from (f"{name} is unknown" for name in found if name not in expected)
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            yield f"{name} is {tuple(found[name].shape)} instead of {tuple(shape)}"


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the {what} does not fit this model: {', '.join(problems[:5])}{more}; use the flags that the "
            "checkpoint was trained with."
        )


def _optimizer_indices(optimizer: Any) -> dict[int, int]:
    """torch's number of each parameter, by the parameter's id."""
    parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    return {id(p): index for index, p in enumerate(parameters)}


def _flat_parameters(model: nn.Module) -> Iterator[_FlatParameter]:
    """Every flat parameter, in the same order on every rank."""
    for path, owner in model.named_modules():
        if not isinstance(owner, FullyShardedDataParallel):
            continue
        for parameter in owner.params:
            infos, shared = parameter._param_infos, parameter._shared_param_infos
            yield _FlatParameter(
                owner=owner,
                parameter=parameter,
                names=[_clean(path, module, name) for module, _, name in infos],
                shapes=parameter._param_shapes,
                aliases={
                    _clean(path, to, to_name): _clean(path, source, source_name)
                    for to, source, _, to_name, _, source_name in shared
                },
            )


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, FullyShardedDataParallel | None]]:
    """(name, buffer, the FSDP root) of each buffer that belongs into a checkpoint."""
    root = model if isinstance(model, FullyShardedDataParallel) else None
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _clean(path, name), buffer, root


def _clean(*path: str) -> str:
    """A dotted name without the wrappers' parts."""
    parts = (part for piece in path for part in piece.split("."))
    return ".".join(part for part in parts if part and part not in _WRAPPERS)
