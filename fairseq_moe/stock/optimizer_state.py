"""Optimizer state by parameter name, for wrappers that keep every parameter whole.

torch numbers the state by a parameter's place in the optimizer. Names outlive that: they are the same for any
number of ranks and any data-parallel wrapper.
"""

from typing import Any

from torch import Tensor, nn

__all__ = ["indexed_optimizer_state", "named_optimizer_state"]


def named_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    """The state of each parameter that has one.

    Args:
        model: the unwrapped model, whose parameters (or float32 masters of them) the optimizer holds.
        optimizer: a fairseq optimizer.
    """
    names = _names_in_order(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {names[index]: values for index, values in state.items()}


def indexed_optimizer_state(
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
    masters = getattr(optimizer, "fp32_params", None)
    if masters is not None and not isinstance(masters, (Tensor, dict)):
        pairs = zip(masters, optimizer.fp16_params, strict=True)
        name_of.update({id(master): name_of[id(p)] for master, p in pairs})
    return [name_of[id(p)] for group in optimizer.optimizer.param_groups for p in group["params"]]
