"""*State by name* of a model under fairscale's FSDP: gathered from the shards, and cut into them again.

Tensors are gathered from the ranks that share them, experts too; a rank keeps those that it is asked to keep, one
flat parameter at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_moe.errors import CheckpointError
from fairseq_moe.models.fitting import is_bookkeeping
from fairseq_moe.stock.checkpoint.named_state import implements_state, keep_all, numbered_groups
from fairseq_moe.stock.checkpoint.parts import has_shape
from fairseq_moe.stock.sharding.flat_parameters import FlatParameter, buffers, flat_parameters

__all__ = ["FairscaleState", "load_full_model_state"]


@implements_state(lambda cfg: cfg.distributed_training.ddp_backend == "fully_sharded")
class FairscaleState:
    """Name parameters that are spread over ranks in flat parts.

    Args:
        trainer: of stock, whose model is the FSDP root.
    """

    owns_memory = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """List flat parameters, under the names of their wrappers."""
        return self._trainer.get_model().named_parameters()  # type: ignore[no-any-return]

    def tensor_bytes(self) -> tuple[dict[str, int], dict[str, str]]:
        """Count the bytes of each gathered tensor; also further names of some of them; needs no communication."""
        sizes, aliases = {}, {}
        for flat in flat_parameters(self._trainer.model):
            itemsize = flat.parameter.dtype.itemsize
            sizes.update(
                {name: shape.numel() * itemsize for name, shape in zip(flat.names, flat.shapes, strict=True)}
            )
            aliases.update(flat.aliases)
        sizes.update(
            {name: buffer.numel() * buffer.dtype.itemsize for name, buffer, _ in buffers(self._trainer.model)}
        )
        return sizes, aliases

    def model_tensors(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, Tensor]:
        """Gather parameters and buffers on CPU, in memory of their own; collective."""
        state: dict[str, Tensor] = {}
        for flat in flat_parameters(self._trainer.model):
            state.update(flat.gather(flat.parameter.data, is_kept))
            state.update({alias: state[name] for alias, name in flat.aliases.items() if name in state})
        for name, buffer, owner in buffers(self._trainer.model):
            if is_kept(name):
                is_halved = owner is not None and owner.mixed_precision and buffer.dtype == torch.float16
                state[name] = (buffer.float() if is_halved else buffer).detach().to("cpu", copy=True)
        return state

    def optimizer_values(self, is_kept: Callable[[str], bool] = keep_all) -> dict[str, dict[str, Any]]:
        """Gather optimizer state as the tensors are; scalars are repeated for each name; collective."""
        optimizer = self._trainer.optimizer
        state, index_of = optimizer.state_dict()["state"], _optimizer_indices(optimizer)
        named: dict[str, dict[str, Any]] = {}
        for flat in flat_parameters(self._trainer.model):
            entries = state.get(index_of.get(id(flat.parameter)), {})
            for key in sorted(entries):
                for name, own in _values_by_name(flat, entries[key], is_kept).items():
                    named.setdefault(name, {})[key] = own
        return named

    def optimizer_form(
        self, named: Mapping[str, Mapping[str, Any]], groups: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Number state and groups as torch numbers the flat parameters.

        Args:
            named: state by name, of all dense parameters and this rank's experts.
            groups: saved hyper-parameters of each parameter group.

        Raises:
            CheckpointError: the state does not fit the model.
        """
        index_of = _optimizer_indices(self._trainer.optimizer)
        flats = [flat for flat in flat_parameters(self._trainer.model) if id(flat.parameter) in index_of]
        known = {name for flat in flats for name in flat.names}
        problems = [f"{name} is unknown" for name in named if name not in known]
        flats = [flat for flat in flats if any(name in named for name in flat.names)]
        problems += [problem for flat in flats for problem in _entry_problems(flat, named)]
        _refuse("optimizer state", problems)
        state = {}
        for flat in flats:
            keys = named[flat.names[0]]
            state[index_of[id(flat.parameter)]] = {key: _flat_value(flat, key, named) for key in keys}
        return {"state": state, "param_groups": numbered_groups(groups, self._trainer.optimizer)}


@torch.no_grad()
def load_full_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what ``FairscaleState.model_tensors`` gave, on any number of ranks; needs no communication.

    Args:
        model: the FSDP root.
        state: all dense tensors and this rank's experts; stock's bookkeeping may be absent and then stays.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs.
    """
    flats = list(flat_parameters(model))
    shapes = {name: shape for flat in flats for name, shape in zip(flat.names, flat.shapes, strict=True)}
    for flat in flats:
        shapes.update({alias: shapes[name] for alias, name in flat.aliases.items()})
    buffer_of = {name: buffer for name, buffer, _ in buffers(model)}
    shapes.update({name: buffer.shape for name, buffer in buffer_of.items()})
    _refuse("model state", list(_shape_problems(state, shapes)))
    for flat in flats:
        flat.parameter.data.copy_(flat.shard(state[name] for name in flat.names))
    for name, buffer in buffer_of.items():
        if name in state:
            buffer.copy_(state[name])
    for flat in flats:
        if hasattr(flat.parameter, "_fp32_shard"):  # set up: there may be gathered copies of the old weights
            flat.owner._free_full_params()


def _values_by_name(flat: FlatParameter, value: Any, is_kept: Callable[[str], bool]) -> dict[str, Any]:
    if has_shape(value):
        return flat.gather(value, is_kept)
    scalar = value.detach().cpu() if isinstance(value, Tensor) else value
    return {
        name: scalar.clone() if isinstance(scalar, Tensor) else scalar for name in flat.names if is_kept(name)
    }


def _flat_value(flat: FlatParameter, key: str, named: Mapping[str, Mapping[str, Any]]) -> Any:
    values = [named[name][key] for name in flat.names]
    if has_shape(values[0]):
        return flat.shard(values).to(flat.parameter.device)
    return values[0].clone() if isinstance(values[0], Tensor) else values[0]


def _entry_problems(flat: FlatParameter, named: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """List what keeps the state of a flat parameter's tensors from being laid end to end."""
    first = next(named[name] for name in flat.names if name in named)
    for name, shape in zip(flat.names, flat.shapes, strict=True):
        entries = named.get(name, {})
        if entries.keys() != first.keys():
            yield f"{name} has {sorted(entries)} instead of {sorted(first)}"
            continue
        for key, value in entries.items():
            if has_shape(value):
                if value.shape != shape:
                    yield f"{key} of {name} is {tuple(value.shape)} instead of {tuple(shape)}"
            elif bool(value != first[key]):
                yield f"{key} of {name} is {value} but {first[key]} of a parameter sharded with it"


def _shape_problems(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in expected if name not in found and not is_bookkeeping(name))
    yield from (f"{name} is unknown" for name in found if name not in expected and not is_bookkeeping(name))
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
    """Map each parameter's id to the number that torch gives it."""
    parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    return {id(p): index for index, p in enumerate(parameters)}
