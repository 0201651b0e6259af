"""A module seen by one other module with a few names replaced."""

from types import ModuleType
from typing import Any

__all__ = ["ModuleProxy"]


class ModuleProxy:
    """Show a module with some of its names replaced, and forward every other name to it.

    Used where stock code must find something else under ``np.x`` or ``torch.x`` and nobody else may.
    """

    def __init__(self, module: "ModuleType | ModuleProxy", **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self.__dict__["_proxied_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_proxied_module"], name)
