"""How stock fairseq is changed: one decorated function per seam, installed once, refused if stock differs.

A seam function receives what it replaces as its first argument and decides when to call it. The
decorator records what stock does, why that breaks an MoE model (or a CPU run), what we do instead and which
test shows it; ``docs/seams.md`` prints these records as a table.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq_moe.errors import StockSeamError

__all__ = ["SEAMS", "Seam", "install_seams", "seam"]


@dataclass(frozen=True, kw_only=True)
class Seam:
    """Describe one change of stock fairseq.

    Args:
        target: ``module:attribute.path`` of the callable or property that is replaced.
        signature: ``str(inspect.signature(...))`` of stock's, names only; None for a property or a class.
        stock_does: what stock does.
        breaks: why that is wrong here.
        we_do: what happens instead.
        test: the test that shows it.
        replacement: called as ``replacement(stock, *args, **kwargs)``; where the target is a class or a
            module, called once as ``replacement(stock)`` to make what stands in its place.
    """

    target: str
    signature: str | None
    stock_does: str
    breaks: str
    we_do: str
    test: str
    replacement: Callable[..., Any]


SEAMS: list[Seam] = []


def seam(
    target: str, *, signature: str | None, stock_does: str, breaks: str, we_do: str, test: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function as the replacement of ``target``; see ``Seam`` for the arguments."""

    def declare(replacement: Callable[..., Any]) -> Callable[..., Any]:
        SEAMS.append(
            Seam(
                target=target,
                signature=signature,
                stock_does=stock_does,
                breaks=breaks,
                we_do=we_do,
                test=test,
                replacement=replacement,
            )
        )
        return replacement

    return declare


def install_seams() -> None:
    """Install every declared seam that is not in place yet; those of a command once it is imported.

    Raises:
        StockSeamError: stock's signature is not the one that the seam was written for.
    """
    for entry in SEAMS:
        module_name, path = entry.target.split(":")
        for module in _modules(module_name):
            _install(entry, module, path)


def _modules(name: str) -> list[Any]:
    """Find the module of that name and, for a command, its twin.

    A command's module sets logging up when it is imported, so it is changed only once somebody has imported
    it. Every command calls fairseq's ``import_user_module`` first, which brings us back here in time. Where
    the command runs as a script or under ``python -m``, its names live in ``__main__``.
    """
    if not name.startswith("fairseq_cli."):
        return [importlib.import_module(name)]
    twins = [sys.modules.get("__main__"), sys.modules.get("__mp_main__")]
    same = [twin for twin in twins if twin is not None and _is_twin(twin, name)]
    return [sys.modules[name], *same] if name in sys.modules else same


def _is_twin(main: Any, name: str) -> bool:
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return bool(spec.name == name)
    main_file, found = getattr(main, "__file__", None), importlib.util.find_spec(name)
    if main_file is None or found is None or found.origin is None:
        return False
    return _same_source(main_file, found.origin)


def _same_source(one: str, other: str) -> bool:
    try:
        with open(one, "rb") as first, open(other, "rb") as second:
            return first.read() == second.read()
    except OSError:
        return False


def _install(entry: Seam, module: Any, path: str) -> None:
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, module)
    stock = inspect.getattr_static(owner, name, None)
    if stock is None:
        raise StockSeamError(_mismatch(entry, "nothing of that name"))
    stock_call: Any = stock.fget if isinstance(stock, property) else stock
    if getattr(stock_call, "__fairseq_moe_seam__", None) is not None:
        return
    if entry.signature is not None:
        found = _names_only(stock_call)
        if found != entry.signature:
            raise StockSeamError(_mismatch(entry, found))

    if inspect.isclass(stock_call) or inspect.ismodule(stock_call):
        bound: Any = entry.replacement(stock_call)
    else:

        @functools.wraps(stock_call)
        def bound(*args: Any, **kwargs: Any) -> Any:
            return entry.replacement(stock_call, *args, **kwargs)

    bound.__fairseq_moe_seam__ = entry.target
    setattr(owner, name, property(bound) if isinstance(stock, property) else bound)
    # The __main__ of a spawned process is a copy of the namespace in which its functions look names up.
    namespace = getattr(stock_call, "__globals__", {})
    if namespace.get(name) is stock_call:
        namespace[name] = bound


def _names_only(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    return "(" + ", ".join(stars.get(entry.kind.name, "") + entry.name for entry in parameters) + ")"


def _mismatch(entry: Seam, found: str) -> str:
    return (
        f"fairseq_moe adapts {entry.target}, expected {entry.signature or 'it to exist'}, but this fairseq "
        f"has {found}; install the fairseq named in fairseq_moe's README (the API of 0.12.3)."
    )
