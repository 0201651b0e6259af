"""The likelihood in blocks equals stock's to the bit: loss and gradient.

Run with ``pytest tests/unit/criterions/test_nll.py``.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.criterions import nll
from fairseq_moe.criterions.nll import summed_nll

T, V, PAD = 77, 501, 1


def stock_nll(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    # In float32 whatever the model computes in; ours leaves float64 as it is.
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    log_probs = F.log_softmax(logits_TV, dim=-1, dtype=dtype)
    return F.nll_loss(log_probs, target_T, ignore_index=PAD, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 16, T, 10 * T])
def test_equal_to_the_bit(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(nll, "_BLOCK_NUMEL", rows * V)
    torch.manual_seed(rows)
    features, weight = torch.randn(T, 8).to(dtype), torch.randn(V, 8).to(dtype)
    target = torch.randint(0, V, (T,))
    target[[0, 5, T - 1]] = PAD
    found = []
    for function in (stock_nll, lambda *args: summed_nll(*args, ignore_index=PAD)):
        x = features.clone().requires_grad_()
        loss = function(F.linear(x, weight), target)
        (loss * 0.3).backward()
        assert x.grad is not None
        found.append((loss.detach(), x.grad))
    assert found[0][0].dtype == found[1][0].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_but_padding(num_tokens: int) -> None:
    logits = torch.randn(num_tokens, V, requires_grad=True)
    loss = summed_nll(logits * 1, torch.full((num_tokens,), PAD), ignore_index=PAD)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None and not logits.grad.any()


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_number() -> None:
    logits = torch.randn(T, V, requires_grad=True) * 1
    loss = summed_nll(logits, torch.randint(0, V, (T,)), ignore_index=PAD)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tensor_of_the_size_of_the_logits_is_made() -> None:
    size, vocabulary = 64, 1 << 17
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != own:
                largest = max(largest, out.numel())
            return out

    logits = torch.randn(size, vocabulary, requires_grad=True) * 1
    own = logits.untyped_storage().data_ptr()
    with Watch():
        loss = summed_nll(logits, torch.zeros(size, dtype=torch.int64), ignore_index=PAD)
        torch.autograd.grad(loss, logits)
    assert largest <= size * vocabulary // 8
