"""The fused attention of the blocks against scores written out, in values and every gradient.

Run with ``pytest tests/unit/modules/test_attend.py``.
"""

import pytest
import torch
from torch import Tensor

from fairseq_moe.modules.blocks.attend import attend


def written_out(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(groups, 1).transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("value_dim", [5, 8, 13])
@pytest.mark.parametrize("num_queries", [7, 2])
def test_values_may_be_narrower_or_wider_than_keys(value_dim: int, num_queries: int) -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4, num_queries, 8), (2, 2, 7, 8), (2, 2, 7, value_dim))
    ]
    found, expected = attend(*inputs, scale=0.3), written_out(*inputs, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
