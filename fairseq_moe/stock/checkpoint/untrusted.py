"""The configuration inside a checkpoint: values, never programs.

A file that torch loads with ``weights_only=True`` can still hold a program as text: stock evaluates several flags
as Python when it builds a model or a task (--decoder-xformers-att-config, --character-filters, the layer lists of
convolutional models). From a command line that is the user's own text; from a checkpoint it is the file's.
"""

import ast
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_moe.errors import CheckpointError
from fairseq_moe.stock.seam import seam

__all__ = ["refuse_programs"]

# What a literal is written with, arithmetic included ("[(512, 3)] * 4"), and names, of which plain words consist.
# Everything else can run something: a call, but also a comprehension, which assigns to attributes.
_HARMLESS = (
    ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Name, ast.Attribute, ast.BinOp,
    ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip


@seam(
    "fairseq.models:build_model",
    signature="(cfg, task, from_checkpoint)",
    stock_does="evaluates flags of the model as Python, also those that come from a checkpoint",
    breaks="fairseq-eval-lm of a malicious file runs its code, although torch has loaded it with weights_only",
    we_do="refuse a checkpoint with a flag that is more than a literal",
    test="tests/reliability/test_r10_untrusted_files.py",
)
def build_model(stock: Callable[..., Any], cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
    if from_checkpoint:
        refuse_programs(cfg)
    return stock(cfg, task, from_checkpoint)


@seam(
    "fairseq.tasks:setup_task",
    signature="(cfg, **kwargs)",
    stock_does="as build_model, for the flags of the task",
    breaks="as build_model, in from_pretrained, which takes the task from the file too",
    we_do="as build_model",
    test="tests/reliability/test_r10_untrusted_files.py",
)
def setup_task(stock: Callable[..., Any], cfg: Any, **kwargs: Any) -> Any:
    if kwargs.get("from_checkpoint"):
        refuse_programs(cfg)
    return stock(cfg, **kwargs)


def refuse_programs(cfg: Any) -> None:
    """Refuse flags of which one is more than a literal.

    Raises:
        CheckpointError: names the flag.
    """
    try:
        found = [(name, text) for name, text in _texts("", _plain(cfg)) if _is_program(text)]
    except OmegaConfBaseException as error:
        # A text that stock could put together from others later, when nobody looks any more.
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"the flags in the checkpoint refer to others that it does not have ({reason}); it cannot be used.",
            agreed=True,
        ) from error
    if found:
        name, text = found[0]
        raise CheckpointError(
            f"the checkpoint's flag {name} is {text[:100]!r}, which fairseq would run as Python, expected a "
            f"plain value; do not use this file, or give a value of your own with --model-overrides "
            f"\"{{'{name}': ...}}\".",
            agreed=True,
        )


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """List every string in a configuration, with the name of its flag."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping | Namespace):
        for key, inner in (value if isinstance(value, Mapping) else vars(value)).items():
            yield from _texts(str(key), _plain(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(name, _plain(inner))


def _is_program(text: str) -> bool:
    try:
        tree = ast.parse(text.lstrip(" \t"), mode="eval")  # eval leaves out the same
    except (SyntaxError, ValueError):
        return False  # eval would not run it either
    except (MemoryError, RecursionError):
        return True
    return any(not isinstance(node, _HARMLESS) for node in ast.walk(tree))
