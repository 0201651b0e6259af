"""--fused-attention: stock's self-attention within rounding, outputs and gradients, and stock's path elsewhere.

Run with ``pytest tests/unit/models/test_attention.py``.
"""

import copy
from typing import Any

import pytest
import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor

from fairseq_moe.models.attention import FusedSelfAttention, fuse_attention

S, B, D, HEADS = 13, 3, 24, 4


def stock_attention(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> MultiheadAttention:
    torch.manual_seed(0)
    attention = MultiheadAttention(D, HEADS, dropout=dropout, self_attention=True)
    for name, parameter in attention.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return attention.to(dtype)


def fused(attention: MultiheadAttention) -> FusedSelfAttention:
    twin = copy.deepcopy(attention)
    fuse_attention(twin)
    assert isinstance(twin, FusedSelfAttention)
    return twin


def future_mask(dtype: torch.dtype) -> Tensor:
    return torch.triu(torch.full((S, S), float("-inf"), dtype=dtype), 1)


def run(attention: MultiheadAttention, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Output and every gradient."""
    x = x.clone().requires_grad_()
    attention.zero_grad()
    torch.manual_seed(1)
    y, _ = attention(x, x, x, need_weights=False, **options)
    torch.manual_seed(2)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    found = {"output": y.detach(), "input": x.grad}
    return found | {name: p.grad for name, p in attention.named_parameters() if p.grad is not None}


# Both sides round; a half-precision value of size 1 is off by up to its machine epsilon a few times over.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_equals_stock_within_rounding(dtype: torch.dtype, causal: bool, dropout: float) -> None:
    stock = stock_attention(dtype, dropout)
    x = torch.randn(S, B, D).to(dtype)
    mask = {"attn_mask": future_mask(dtype) if causal else None}
    expected, found = run(stock, x, **mask), run(fused(stock), x, **mask)
    assert found.keys() == expected.keys() and len(found) == 10
    for name, tensor in expected.items():
        size = float(tensor.double().abs().max()) + 1.0
        torch.testing.assert_close(
            found[name].double(), tensor.double(), rtol=0, atol=TOLERANCES[dtype] * size, msg=name
        )


def test_the_mask_is_not_read_and_later_tokens_are_not_seen() -> None:
    attention = fused(stock_attention())
    x = torch.randn(S, B, D)
    changed = torch.cat([x[:6], torch.randn(S - 6, B, D)])
    mask = future_mask(torch.float32)
    outputs = [attention(rows, rows, rows, need_weights=False, attn_mask=mask)[0] for rows in (x, changed)]
    assert torch.equal(outputs[0][:6], outputs[1][:6])
    assert not torch.equal(outputs[0][6:], outputs[1][6:])


def test_padding_takes_stocks_path() -> None:
    stock = stock_attention()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, -4:] = True
    options = {"attn_mask": future_mask(torch.float32), "key_padding_mask": padding}
    x = torch.randn(S, B, D)
    expected, found = run(stock, x, **options), run(fused(stock), x, **options)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_one_token_at_a_time_equals_the_whole() -> None:
    attention = fused(stock_attention()).eval()
    x = torch.randn(S, B, D)
    whole, _ = attention(x, x, x, need_weights=False, attn_mask=future_mask(torch.float32))
    state: dict[str, Any] = {}
    steps = [attention(row, row, row, need_weights=False, incremental_state=state)[0] for row in x.split(1)]
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-5, atol=1e-5)


def test_attention_weights_are_those_of_stock() -> None:
    stock = stock_attention()
    x = torch.randn(S, B, D)
    mask = future_mask(torch.float32)
    expected, found = (attention(x, x, x, attn_mask=mask) for attention in (stock, fused(stock)))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_only_self_attention_is_replaced_and_parameters_stay_the_same_objects() -> None:
    between = MultiheadAttention(D, HEADS, encoder_decoder_attention=True)
    model = torch.nn.ModuleList([stock_attention(), between])
    before = dict(model.named_parameters())
    fuse_attention(model)
    assert [type(child) for child in model] == [FusedSelfAttention, MultiheadAttention]
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
