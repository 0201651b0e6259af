"""Adam in blocks equals fairseq's to the bit: parameters, moments and their precision.

Run with ``pytest tests/unit/optim/test_blocked_adam.py``.
"""

import copy
import inspect

import pytest
import torch
from fairseq.optim.adam import Adam

from fairseq_moe.optim import blocked_adam
from fairseq_moe.optim.blocked_adam import can_step_in_blocks, step_in_blocks

stock_step = inspect.unwrap(Adam.step)


def make_optimizer(dtype: torch.dtype, *, weight_decay: float) -> Adam:
    torch.manual_seed(0)
    shapes = [(4, 30, 7), (5,), (1, 1), (0,), (6, 8)]
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    parameters[-1].data = torch.randn(8, 6).to(dtype).t()  # not contiguous
    parameters.append(torch.nn.Parameter(torch.randn(3)))  # never gets a gradient
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03}]
    return Adam(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay)


def give_gradients(optimizer: Adam, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.shape != (3,):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 13, 1 << 17])
def test_equal_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype, weight_decay: float
) -> None:
    monkeypatch.setattr(blocked_adam, "_BLOCK_NUMEL", block)
    stock = make_optimizer(dtype, weight_decay=weight_decay)
    blocked = copy.deepcopy(stock)
    for update in range(3):
        for optimizer in (stock, blocked):
            give_gradients(optimizer, update)
        assert can_step_in_blocks(blocked)
        stock_step(stock)
        step_in_blocks(blocked)
        blocked.load_state_dict(copy.deepcopy(blocked.state_dict()))  # as after a checkpoint
        stock.load_state_dict(copy.deepcopy(stock.state_dict()))
    for expected_group, group in zip(stock.param_groups, blocked.param_groups, strict=True):
        for expected, p in zip(expected_group["params"], group["params"], strict=True):
            assert torch.equal(p, expected)
            assert stock.state[expected].keys() == blocked.state[p].keys()
            for name, value in stock.state[expected].items():
                found = blocked.state[p][name]
                assert type(found) is type(value) and torch.equal(
                    torch.as_tensor(found), torch.as_tensor(value)
                )


def test_what_it_leaves_to_stock() -> None:
    optimizer = make_optimizer(torch.float32, weight_decay=0.0)
    optimizer.param_groups[0]["amsgrad"] = True
    assert not can_step_in_blocks(optimizer)
    sparse = torch.nn.Parameter(torch.zeros(3, 3))
    sparse.grad = torch.eye(3).to_sparse()
    assert not can_step_in_blocks(Adam([sparse]))


def test_the_seam_steps_once_and_passes_the_closure_on() -> None:
    import fairseq_moe  # noqa: F401

    stock = make_optimizer(torch.float32, weight_decay=0.1)
    seamed = copy.deepcopy(stock)
    for optimizer in (stock, seamed):
        give_gradients(optimizer, 0)
    stock_step(stock)
    assert seamed.step(lambda: "loss") == "loss"
    assert torch.equal(seamed.param_groups[0]["params"][0], stock.param_groups[0]["params"][0])
