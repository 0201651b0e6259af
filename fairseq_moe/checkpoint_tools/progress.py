"""A bar on the terminal while bytes go by: rich's where it is installed, a percentage where it is not."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from fairseq_moe.checkpoint import LazyTensor, ShardContent

__all__ = ["content_bytes", "progress", "tracked"]


@contextmanager
def progress(label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is to be called with each number of bytes that is done.

    Nothing is printed where standard error is no terminal.

    Args:
        label: what is being done.
        num_bytes: all of them.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
    elif importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=num_bytes)
            yield lambda done: bar.advance(task, done)
    else:
        counted = 0

        def advance(done: int) -> None:
            nonlocal counted
            counted += done
            sys.stderr.write(f"\r{label}: {min(100, 100 * counted // max(num_bytes, 1))} %")
            sys.stderr.flush()

        yield advance
        sys.stderr.write("\n")


def tracked(content: ShardContent, advance: Callable[[int], None]) -> ShardContent:
    """The same content, which tells ``advance`` the size of each tensor that has been read."""

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
    """Size of all its tensors."""
    states = [value for values in content.optimizer.values() for value in values.values()]
    return sum(
        value.dtype.itemsize * _numel(value.shape)
        for value in [*content.model.values(), *states]
        if isinstance(value, LazyTensor | Tensor)
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
