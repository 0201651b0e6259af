"""Memory of CPU tensors that is used again: never while anyone uses it, and not hoarded."""

from typing import ClassVar

import pytest
import torch

from fairseq_moe.modules.kernels import cpu_memory
from fairseq_moe.modules.kernels.cpu_memory import _Pool, empty

LIKE = torch.empty(0)
LARGE = (1024, 512)  # 2 MiB


def test_memory_is_taken_again_when_nobody_uses_it() -> None:
    first = empty(LARGE, like=LIKE)
    address = first.data_ptr()
    view = first[10:20].t()
    del first
    second = empty(LARGE, like=LIKE)
    assert second.data_ptr() != address  # a view is a use
    del view
    assert empty(LARGE, like=LIKE).data_ptr() == address


class Ones(torch.autograd.Function):
    """Its gradient is of lent memory, whose addresses it notes."""

    handed: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out = empty(LARGE, like=grad).fill_(1)
        Ones.handed.append(out.data_ptr())
        return out


def test_a_gradient_is_a_use_until_it_is_dropped() -> None:
    parameter = torch.nn.Parameter(torch.zeros(LARGE))
    Ones.apply(parameter).backward()
    assert parameter.grad is not None
    address = parameter.grad.data_ptr()
    Ones.apply(parameter).backward()  # a second micro-batch is added to the first
    assert parameter.grad.data_ptr() == address and parameter.grad.eq(2).all()
    parameter.grad = None
    Ones.apply(parameter).backward()
    assert parameter.grad.eq(1).all()


def test_autograd_takes_the_tensor_as_it_is() -> None:
    """No copy into ``p.grad``: that would cost what this module saves."""
    parameter = torch.nn.Parameter(torch.zeros(LARGE))
    Ones.apply(parameter).backward()
    assert parameter.grad is not None and parameter.grad.data_ptr() == Ones.handed[-1]


def test_dtype_shape_and_alignment() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool):
        tensor = empty((3, 1000, 700), like=LIKE, dtype=dtype)
        assert tensor.shape == (3, 1000, 700) and tensor.dtype is dtype
        assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    assert empty(LARGE, like=LIKE.double()).dtype is torch.float64


@pytest.mark.parametrize(("rows", "is_same"), [(1000, True), (600, True), (1200, False), (500, False)])
def test_a_block_serves_what_is_a_little_smaller_and_nothing_else(rows: int, is_same: bool) -> None:
    pool = _Pool()
    pool.empty((1000, 1000), torch.float32)
    (block,) = pool.blocks
    assert 4_000_000 <= block.num_bytes <= 1.25 * 4_000_000
    pool.empty((rows, 1000), torch.float32)
    assert (pool.blocks == [block]) is is_same


def held_bytes(pool: _Pool) -> int:
    return sum(block.num_bytes for block in pool.blocks)


def test_blocks_are_never_much_more_than_was_in_use_at_once() -> None:
    pool = _Pool()
    sizes = torch.randint(300, 3000, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for size in sizes:  # one at a time, each of another size
        pool.empty((size, 1000), torch.float32)
        assert held_bytes(pool) <= 1.25 * 1.25 * 4000 * max(sizes)
    both = [pool.empty((size, 1000), torch.float32) for size in (2000, 4000)]
    most = held_bytes(pool)
    both.clear()
    for size in sizes:
        pool.empty((size, 1000), torch.float32)
        assert held_bytes(pool) <= 1.25 * most


def test_gradients_stay_while_the_number_of_rows_varies() -> None:
    pool = _Pool()

    def update(*num_rows: int) -> list[int]:
        hidden = [pool.empty((rows, 1000), torch.float32) for rows in num_rows]
        gradients = []
        for _ in num_rows:  # a layer's hidden values are gone when the next layer's gradients are made
            gradients += [pool.empty((5000, 1000), torch.float32) for _ in range(2)]
            hidden.pop()
        return sorted(gradient.data_ptr() for gradient in gradients)

    first = update(1000, 900)
    for num_rows in ((990, 400), (300, 700), (950, 950), (400, 1000), (700, 200)):
        assert update(*num_rows) == first


def test_release_gives_back_what_nobody_uses() -> None:
    pool = _Pool()
    used, unused = (pool.empty(LARGE, torch.float32) for _ in range(2))
    del unused
    pool.release()
    assert held_bytes(pool) == used.nbytes


def test_small_tensors_and_other_devices_are_left_to_torch() -> None:
    before = len(cpu_memory._POOL.blocks)
    empty((4,), like=LIKE)
    assert empty(LARGE, like=LIKE.to("meta")).is_meta
    assert len(cpu_memory._POOL.blocks) == before
