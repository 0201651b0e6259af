"""Read which layers a flag speaks of: every N-th, or a list of zeros and ones (Megatron's rule)."""

import ast
from typing import Any

from fairseq_moe.flags.records import flag_name

__all__ = ["layer_pattern"]

_MAX_PATTERN = 100_000  # layers


def layer_pattern(text: str, num_layers: int, name: str) -> list[bool]:
    """Mark the layers that a pattern names.

    Args:
        text: N (layers 0, N, 2N, ...; Megatron's rule), or a list of 0 and 1 such as ``([0]+[1]*23)``.
        num_layers: decoder layers.
        name: field of the flag.

    Raises:
        ValueError: one sentence.
    """
    problem = (
        f"{flag_name(name)} is {text!r}, expected a number N or {num_layers} zeros and ones such as "
        f"([0]+[1]*{num_layers - 1})."
    )
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(problem) from error
    if isinstance(value, int) and value >= 1:
        return [index % value == 0 for index in range(num_layers)]
    if isinstance(value, list) and len(value) == num_layers and all(mark in (0, 1) for mark in value):
        return [bool(mark) for mark in value]
    raise ValueError(problem)


def _evaluate(node: ast.expr) -> Any:
    """Evaluate lists of integers, added and repeated: nothing else, and no list grows beyond reason."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        sizes = [len(value) if isinstance(value, list) else value for value in (left, right)]
        if sizes[0] * sizes[1] <= _MAX_PATTERN:
            return left * right
    raise TypeError("not a list of integers")
