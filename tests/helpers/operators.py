"""Operators that torch calls within a block, by name."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operators"]

_LAUNCH_NOTHING = {"detach", "empty", "empty_like", "empty_strided", "new_empty"}


class Operators(TorchDispatchMode):
    """Counts the operators that are called; one in place counts as the one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.launches = 0  # those that a GPU would launch a kernel for: no views, no allocations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        self.names[name] += 1
        self.launches += not func.is_view and name not in _LAUNCH_NOTHING
        return func(*args, **(kwargs or {}))
