"""One step of Adam: kernel and twin against fairseq's own, over several steps, within one rounding."""

import copy
import inspect

import pytest
import torch
from fairseq.optim.adam import Adam

from fairseq_moe.fused.adam import AdamStep, adam_step_, adam_step_slowly_
from fairseq_moe.optim.one_pass_adam import OnePassAdam, step_in_one_pass

stock_step = inspect.unwrap(Adam.step)
SHAPES = [(40, 70), (5,), (), (0,), (6, 8), (1, 1)]
# One unit in the last place of a number near 1.
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def make_optimizer(dtype: torch.dtype, *, weight_decay: float = 0.1) -> Adam:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    parameters[4].data = torch.randn(8, 6).to(dtype).t()  # not contiguous
    parameters.append(torch.nn.Parameter(torch.randn(3).to(dtype)))  # never gets a gradient
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.003, "weight_decay": 0.0}]
    return Adam(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay)


def give_gradients(optimizer: Adam, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.shape != (3,):
                p.grad = (torch.randn(p.shape, generator=generator) * factor).to(p.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_steps_are_those_of_stock(dtype: torch.dtype, weight_decay: float) -> None:
    stock = make_optimizer(dtype, weight_decay=weight_decay)
    ours = copy.deepcopy(stock)
    step_in_one_pass(ours)
    assert type(ours) is OnePassAdam
    for update in range(4):
        for optimizer in (stock, ours):
            give_gradients(optimizer, update)
        stock_step(stock)
        ours.step()
        if (
            dtype is torch.float32
        ):  # as after a checkpoint; others are loaded by fairseq, which keeps float32 moments
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
            stock.load_state_dict(copy.deepcopy(stock.state_dict()))
    for expected_group, group in zip(stock.param_groups, ours.param_groups, strict=True):
        for expected, p in zip(expected_group["params"], group["params"], strict=True):
            # Each of the four steps rounds once, and may round the other way.
            torch.testing.assert_close(p, expected, atol=4 * ULP[dtype], rtol=4 * ULP[dtype])
            assert stock.state[expected].keys() == ours.state[p].keys()
            for name, value in stock.state[expected].items():
                found = ours.state[p][name]
                assert type(found) is type(value)
                torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_a_noted_factor_is_that_of_the_gradients(dtype: torch.dtype) -> None:
    stock = make_optimizer(dtype)
    ours = copy.deepcopy(stock)
    step_in_one_pass(ours)
    for update in range(3):
        give_gradients(stock, update)
        give_gradients(ours, update, factor=8.0)
        stock_step(stock)
        ours.scale_gradients(0.5)
        ours.scale_gradients(torch.tensor(0.25))
        assert float(ours.factor or 1.0) == 0.125
        ours.step()
        assert ours.factor is None
    ours.scale_gradients(3.0)
    ours.zero_grad()
    assert ours.factor is None
    for expected_group, group in zip(stock.param_groups, ours.param_groups, strict=True):
        for expected, p in zip(expected_group["params"], group["params"], strict=True):
            torch.testing.assert_close(p, expected, atol=3 * ULP[dtype], rtol=3 * ULP[dtype])


def test_a_factor_stays_on_the_host_until_the_step() -> None:
    """The meta device stands for a GPU: what is there would have to be waited for."""
    optimizer = Adam([torch.nn.Parameter(torch.ones(2, device="meta"))])
    optimizer.__class__ = OnePassAdam
    optimizer.scale_gradients(0.5)
    assert optimizer.factor == 0.5
    optimizer.scale_gradients(torch.tensor(0.25))  # what clips, by a norm on the host
    assert float(optimizer.factor) == 0.125
    taken = optimizer.take_factor()
    assert taken.device.type == "meta" and taken.dtype is torch.float32 and taken.dim() == 0
    optimizer.scale_gradients(torch.ones((), device="meta"))
    optimizer.scale_gradients(3.0)
    assert optimizer.take_factor().device.type == "meta"


@pytest.mark.parametrize("grad_dtype", ULP, ids=str)
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_kernel_against_twin(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Float32 copies may be stepped with gradients of half precision, and the other way round."""
    torch.manual_seed(0)
    values, grad = torch.randn(5001).to(dtype), torch.randn(5001).to(grad_dtype)
    moments = torch.randn(5001), torch.rand(5001)
    step = AdamStep(lr=0.1, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, step=7)
    found, expected = ([values.clone(), grad.clone(), *map(torch.clone, moments)] for _ in range(2))
    adam_step_(*found, step, scale=torch.tensor(0.3))
    adam_step_slowly_(*expected, step, scale=torch.tensor(0.3))
    torch.testing.assert_close(found[0], expected[0], atol=ULP[dtype], rtol=ULP[dtype])
    for a, b in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_only_stock_adam_is_changed() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    others = [
        Adam(parameters, amsgrad=True),
        torch.optim.SGD(parameters),
        Adam([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]),
    ]
    for optimizer in others:
        kind = type(optimizer)
        step_in_one_pass(optimizer)
        assert type(optimizer) is kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(31, 70), (0,), ()], ids=str)
def test_a_copy_is_the_stepped_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, grad = torch.randn(shape), torch.randn(shape).to(dtype)
    step = AdamStep(lr=0.1, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, step=1)
    for function in (adam_step_, adam_step_slowly_):
        found, copy = values.clone(), torch.zeros(shape, dtype=dtype)
        function(found, grad, torch.zeros(shape), torch.zeros(shape), step, copy=copy)
        # The interpreter does not round to bfloat16, it cuts off.
        is_cut = function is adam_step_ and dtype is torch.bfloat16
        torch.testing.assert_close(copy, found.to(dtype), atol=0.0, rtol=2.0**-7 if is_cut else 0.0)


def test_what_a_step_leaves_to_stock() -> None:
    """Overrides may turn amsgrad on after the class was changed; stock refuses sparse gradients by a sentence."""
    stock = make_optimizer(torch.float32)
    ours = copy.deepcopy(stock)
    step_in_one_pass(ours)
    for optimizer in (stock, ours):
        for group in optimizer.param_groups:
            group["amsgrad"] = True
    give_gradients(stock, 0)
    give_gradients(ours, 0, factor=4.0)
    ours.scale_gradients(0.25)
    stock_step(stock)
    ours.step()
    for expected_group, group in zip(stock.param_groups, ours.param_groups, strict=True):
        for expected, p in zip(expected_group["params"], group["params"], strict=True):
            torch.testing.assert_close(p, expected)
            assert ours.state[p].keys() == stock.state[expected].keys()
    sparse = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = Adam([sparse])
    step_in_one_pass(optimizer)
    sparse.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
