"""Measure the content of a checkpoint, and count how much of it has been read, for progress bars."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint import LazyTensor, ShardContent

__all__ = ["content_bytes", "tracked"]


def tracked(content: ShardContent, advance: Callable[[int], None]) -> ShardContent:
    """Copy a content so that it tells ``advance`` the size of each tensor that has been read."""

    def track(value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return value

        def load() -> Tensor:
            tensor = value.load()
            advance(tensor.nbytes)
            return tensor

        return replace(value, load=load)

    return replace(
        content,
        model={name: track(value) for name, value in content.model.items()},
        optimizer={
            name: {state: track(value) for state, value in values.items()}
            for name, values in content.optimizer.items()
        },
    )


def content_bytes(content: ShardContent) -> int:
    """Add up the bytes of all tensors of a content."""
    states = [value for values in content.optimizer.values() for value in values.values()]
    return sum(
        value.dtype.itemsize * torch.Size(value.shape).numel()
        for value in [*content.model.values(), *states]
        if isinstance(value, LazyTensor | Tensor)
    )
