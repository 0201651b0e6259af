"""Memory of CPU tensors that is used again: never while anyone uses it, and not hoarded."""

import gc

import torch

from fairseq_moe.modules import host_memory
from fairseq_moe.modules.host_memory import empty

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


def test_a_gradient_is_a_use_until_it_is_dropped() -> None:
    parameter = torch.nn.Parameter(torch.zeros(LARGE))

    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return empty(LARGE, like=grad).fill_(1)

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
    handed: list[int] = []
    parameter = torch.nn.Parameter(torch.zeros(LARGE))

    class Zeros(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            out = empty(LARGE, like=grad).zero_()
            handed.append(out.data_ptr())
            return out

    Zeros.apply(parameter).backward()
    assert parameter.grad is not None and parameter.grad.data_ptr() == handed[0]


def test_dtype_shape_and_alignment() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool):
        tensor = empty((3, 1000, 700), like=LIKE, dtype=dtype)
        assert tensor.shape == (3, 1000, 700) and tensor.dtype is dtype
        assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    assert empty(LARGE, like=LIKE.double()).dtype is torch.float64


def test_nearly_equal_sizes_share_a_block() -> None:
    first = empty((1000, 1000), like=LIKE)
    address = first.data_ptr()
    del first
    assert empty((1010, 1000), like=LIKE).data_ptr() == address


def test_what_fits_nobody_goes_back_to_the_system() -> None:
    pool = host_memory._POOL
    del_me = [empty((n, 1024, 1024), like=LIKE) for n in (1, 2, 3)]
    del_me.clear()
    gc.collect()
    kept = empty((7, 1024, 1024), like=LIKE)
    assert all(block.fits(kept.nbytes) or not block.is_free for block in pool._blocks)


def test_small_tensors_and_other_devices_are_left_to_torch() -> None:
    before = len(host_memory._POOL._blocks)
    empty((4,), like=LIKE)
    assert empty(LARGE, like=LIKE.to("meta")).is_meta
    assert len(host_memory._POOL._blocks) == before
