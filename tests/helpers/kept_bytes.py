"""Count what autograd keeps for a backward pass, in bytes of storages."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["kept_bytes"]


def kept_bytes(model: Any, criterion: Any, sample: dict[str, Any]) -> int:
    """Add up the storages that autograd keeps of one forward pass and loss."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        criterion(model, sample)
    return sum(storage.nbytes() for storage in found.values())
