"""The fused attention of the blocks against scores written out, in values and every gradient: windows, sinks, padding.

Run with ``pytest tests/unit/modules/test_attend.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.blocks.attend import attend
from fairseq_moe.modules.blocks.window import saves_keys


def weights_written_out(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    padding_BT: Tensor | None,
    sinks_H: Tensor | None,
    window: int | None,
) -> Tensor:
    """Softmax over all keys and, where there are sinks, one more column that is dropped: (B, H, S, T)."""
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    queries = torch.arange(k.shape[2] - q.shape[2], k.shape[2]).unsqueeze(-1)
    keys = torch.arange(k.shape[2])
    hidden = keys > queries
    if window is not None:
        hidden = hidden | (queries - keys >= window)
    if padding_BT is not None:
        hidden = hidden | (padding_BT[:, None, None] & (keys != queries))
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]]


def written_out(q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> Tensor:
    rules = {"padding_BT": None, "sinks_H": None, "window": None, **rules}
    weights = weights_written_out(q, k, **rules)
    return (weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)).transpose(1, 2).flatten(2)


def drawn(
    num_queries: int,
    num_keys: int,
    *,
    value_dim: int = 8,
    groups: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Queries, keys, values and sinks."""
    torch.manual_seed(0)
    shapes = ((2, 4, num_queries, 8), (2, groups, num_keys, 8), (2, groups, num_keys, value_dim), (4,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def padding_of(num_keys: int) -> Tensor:
    """The first third of one sequence and the last quarter of the other."""
    padding = torch.zeros(2, num_keys, dtype=torch.bool)
    padding[0, : num_keys // 3], padding[1, -(num_keys // 4) :] = True, num_keys > 3
    return padding


def largest_difference(inputs: list[Tensor], rules: dict[str, Any], others: dict[str, Any]) -> float:
    """Of outputs and every gradient, with the fused rules and with the written ones, relative to the largest."""
    found, expected = (
        attend(*inputs[:3], scale=0.3, **rules),
        written_out(*(x.double() for x in inputs[:3]), scale=0.3, **others),
    )
    weight = torch.randn_like(expected)
    used = inputs if "sinks_H" in rules else inputs[:3]
    grads = [torch.autograd.grad((y * weight.to(y.dtype)).sum(), used) for y in (found, expected)]
    pairs = [(found, expected), *zip(*grads, strict=True)]
    # Through a window of one position no gradient reaches queries and keys.
    return max(float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=0.1)) for a, b in pairs)


@pytest.mark.parametrize("value_dim", [5, 8, 13])
@pytest.mark.parametrize("num_queries", [7, 2])
def test_values_may_be_narrower_or_wider_than_keys(value_dim: int, num_queries: int) -> None:
    assert largest_difference(drawn(num_queries, 7, value_dim=value_dim), {}, {}) < 1e-12


# Queries and keys: of whole sequences, of one new token, of some after others; those of the second row are cut into
# blocks where the window is small.
SIZES = [(7, 7), (1, 7), (5, 7), (1, 1)]
LONG = [(200, 200), (150, 200), (129, 131)]


@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        *((sizes, window) for sizes in SIZES for window in (None, 1, 3, 9)),
        *((sizes, window) for sizes in LONG for window in (1, 30, 65, 199)),
    ],
    ids=str,
)
def test_windows_and_sinks(
    sizes: tuple[int, int], window: int | None, has_sinks: bool, is_padded: bool
) -> None:
    inputs = drawn(*sizes, value_dim=5)
    rules: dict[str, Any] = {"window": window, "padding_BT": padding_of(sizes[1]) if is_padded else None}
    if has_sinks:
        rules["sinks_H"] = inputs[3]
    assert largest_difference(inputs, rules, rules) < 1e-12


def test_both_ways_to_look_through_a_window_are_tested() -> None:
    assert saves_keys(200, 200, 65) and saves_keys(129, 131, 30)
    assert not saves_keys(200, 200, 199) and not saves_keys(7, 7, 3)


def test_absent_queries_of_a_last_block_have_no_gradient() -> None:
    rules = {"window": 30}
    assert largest_difference(drawn(129, 131), {**rules, "padded_see_themselves": False}, rules) < 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(100, 100), (1, 100)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)], ids=lambda each: str(each)
)
def test_precisions_and_shared_heads(
    dtype: torch.dtype, bound: float, sizes: tuple[int, int], groups: int
) -> None:
    inputs = drawn(*sizes, groups=groups, dtype=dtype)
    for window in (None, 20):
        rules = {"sinks_H": inputs[3], "window": window}
        assert largest_difference(inputs, rules, rules | {"sinks_H": inputs[3].double()}) < bound


def test_wrong_rules_are_seen() -> None:
    inputs = drawn(100, 100)
    rules = {"window": 20, "sinks_H": inputs[3], "padding_BT": padding_of(100)}
    for other in ({"window": 19}, {"window": 21}, {"padding_BT": None}, {"sinks_H": inputs[3] * 1.01}):
        assert largest_difference(inputs, rules, rules | other) > 1e-3, other
    leaving_out = rules | {"sinks_H": None}
    found, expected = (
        attend(*inputs[:3], scale=0.3, **rules),
        written_out(*inputs[:3], scale=0.3, **leaving_out),
    )
    assert float((found - expected).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("window", [None, 5])
def test_dropout_drops_weights_beside_the_sink(window: int | None) -> None:
    q, k, _, sinks = drawn(70, 70)
    v = torch.eye(70, dtype=torch.float64).expand(2, 2, 70, 70)  # outputs are weights
    q, k, sinks = (value.detach() for value in (q, k, sinks))
    found = attend(q, k, v, scale=0.3, dropout=0.5, sinks_H=sinks, window=window)
    found_BHST = found.unflatten(-1, (4, 70)).transpose(1, 2)
    weights = weights_written_out(q, k, scale=0.3, padding_BT=None, sinks_H=sinks, window=window)
    is_kept = found_BHST != 0
    assert float((found_BHST - is_kept * weights / 0.5).abs().max()) < 1e-12
    assert 0.4 < float(is_kept[weights > 0].double().mean()) < 0.6


def kept_numbers(length: int, **rules: Any) -> int:
    """Count the numbers that autograd keeps of attention over so many positions, but for its inputs."""
    inputs = drawn(length, length, dtype=torch.float32)
    rules = rules | ({"sinks_H": inputs[3]} if rules.pop("sinks", False) else {})
    found: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(*inputs[:3], scale=0.3, **rules)
    return sum(storage.nbytes() for storage in found.values()) // 4


@pytest.mark.parametrize("rules", [{"sinks": True}, {"window": 32}, {"window": 32, "sinks": True}], ids=str)
def test_what_is_kept_grows_with_positions_and_not_with_their_square(rules: dict[str, Any]) -> None:
    short, long = kept_numbers(1024, **rules), kept_numbers(4096, **rules)
    assert long < 4.1 * short and long < 4096**2 / 4
